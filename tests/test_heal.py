"""Divergence is recognised, undone and explained, alike in every repetition."""

import dataclasses
import functools
import json
import math
import random
import signal
import subprocess
import sys
import time
from copy import deepcopy
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, blobs, copied, recipe, surefoot, surefoot_process
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scenarios import SCENARIOS, _mislabel, base, batch_normed, mixture, mlp, play, spoiling
from test_kill import newest_step
from torch.utils._python_dispatch import TorchDispatchMode

import surefoot as sf
from surefoot.api import result, run_steps
from surefoot.blame import usual_loss
from surefoot.build import build
from surefoot.data.plan import Plan
from surefoot.export.progress import alarms
from surefoot.guard import judge
from surefoot.guard.detect import LOSS_SPIKE, NOT_FINITE
from surefoot.guard.history import History, Intervention
from surefoot.guard.judge import Judge
from surefoot.guard.review import Alarm, may_have_done_harm
from surefoot.guard.watch import Watch
from surefoot.heal import Healer
from surefoot.operations import Operations
from surefoot.record.folder import RunFolder
from surefoot.record.incidents import of_event
from surefoot.types import Minibatch, Slots

BY_NUMBER = {s.number: s for s in SCENARIOS}
MUST_BREAK = (1, 2, 3, 4, 5, 7, 8, 10, 11, 12)
RESTRAINED = (6, 13)
CHANCE = 0.25


def events(run, kind):
    return [e for e in sf.open_run(run).events(all_events=True) if e["kind"] == kind]


# ---------------------------------------------------------------------------------- detectors

numbers = st.one_of(
    st.floats(1e-6, 1e6), st.sampled_from([0.0, math.inf, -math.inf, math.nan, 1e300]), st.floats(-10, 10)
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers.map(abs)), min_size=1, max_size=100),
    st.sampled_from(["heal", "watch"]),
    st.sampled_from([0, 1, 32]),
)
@example([(1.0, 1.0)] * 37 + [(1.0, 8.0)], "heal", 32)
def test_a_device_decides_as_a_host_does(rows, mode, young):
    """What runs on a GPU, run on the CPU."""
    with mock.patch.object(judge, "YOUNG", young):
        decide_alike(rows, mode)


def decide_alike(rows, mode):
    here, there = (Watch(sf.Guard(mode), torch.device("cpu")) for _ in range(2))
    there.judge = Judge(torch.device("cpu"), on_host=False)
    rng = np.random.default_rng(0)
    early = [(2 + 0.1 * rng.normal(), rng.lognormal()) for _ in range(rng.integers(0, 70))]
    for step, numbers_now in enumerate([*early, *rows]):
        loss, norm = (torch.tensor(x, dtype=torch.float64) for x in numbers_now)
        a = here.permit(loss, norm, step=step, scaled=False)
        b = there.permit(loss, norm, step=step, scaled=False)
        assert a.permitted.item() == b.permitted.item()
        assert a.verdict == float(b.verdict)
        assert a.clip == pytest.approx(float(b.clip), rel=1e-9)
    assert (here.judge.seen is None) == (there.judge.seen is None)
    if here.judge.seen is not None:
        for a, b in zip(here.judge.seen, there.judge.seen, strict=True):
            assert np.asarray(a) == pytest.approx(np.asarray(b), rel=1e-9)
            assert np.isfinite(a).all()


@pytest.mark.parametrize("host", [True, False])
def test_limits_follow_a_block_at_once_in_a_young_run_and_later_some_steps_late(host, monkeypatch):
    """Also where the state is put back after each step."""
    monkeypatch.setattr(judge, "YOUNG", 2)
    going_on, changes = Judge(torch.device("cpu"), on_host=host), []
    for step in range(1, 250):
        before = going_on.allowed
        going_on.take(*map(going_on.tensor_or_float, (1.0 + 0.001 * step, 1.0)))
        if going_on.allowed is not None and (before is None or going_on.allowed != before):
            changes.append(step)
        kept, going_on = going_on.state_dict(), Judge(torch.device("cpu"), on_host=host)
        going_on.load_state_dict(kept)
    assert changes == [64, 96, 128, 176, 208, 240]


def verdicts(rows):
    guard = Watch(sf.Guard(), torch.device("cpu"))
    found = []
    for step, (loss, norm) in enumerate(rows):
        found.append(guard.permit(torch.tensor(loss), torch.tensor(norm), step=step, scaled=False))
    return found


@given(st.lists(st.floats(0.8, 1.5), min_size=100, max_size=300))
def test_calm_steps_are_left_alone(losses):
    assert all((p.verdict, p.clip) == (0, 1.0) for p in verdicts([(loss, loss) for loss in losses]))


def test_a_lasting_change_is_taken_up_within_some_hundred_steps():
    found = [p.verdict for p in verdicts([(1.0, 1.0)] * 100 + [(50.0, 50.0)] * 300)]
    assert not any(found[:100])
    assert found[100] != 0
    assert not any(found[300:])


def test_half_the_first_loss_is_a_spike_where_it_lasts_only():
    calm = [(1.0 + 0.001 * (i % 7), 1.0) for i in range(200)]
    found = [p.verdict for p in verdicts([(10.0, 1.0), *calm, (7.0, 1.0), *calm, (7.0, 1.0), (7.0, 1.0)])]
    assert not any(found[:-1])
    assert found[-1] == LOSS_SPIKE


def test_a_device_is_not_waited_for():
    """No number goes there from the host, or comes back, after the burn-in."""

    class Seen(TorchDispatchMode):
        names = frozenset()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Seen.names |= {function.name()}
            return function(*args, **(kwargs or {}))

    judge, one = Judge(torch.device("cpu"), on_host=False), torch.tensor(1.0, dtype=torch.float64)
    for _ in range(64):
        judge.take(one, one)
    with Seen():
        for _ in range(64):
            judge.take(one, one)
    assert "aten::exp" in Seen.names
    assert not {"aten::lift_fresh", "aten::_local_scalar_dense"} & Seen.names


@pytest.mark.parametrize("host", [True, False])
def test_an_infinite_loss_is_refused_however_large_the_usual_ones_are(host):
    judge = Judge(torch.device("cpu"), on_host=host)
    huge, one, infinite = map(judge.tensor_or_float, (9e307, 1.0, math.inf))
    for _ in range(64):
        judge.take(huge, one)
    assert judge.take(infinite, one).verdict == NOT_FINITE
    assert judge.take(one, infinite).verdict == NOT_FINITE


@given(st.lists(st.tuples(numbers, numbers.map(abs)), min_size=1, max_size=150), numbers, numbers.map(abs))
def test_what_is_certain_to_pass_passes(rows, loss, norm):
    """The bounds that the compiled step is given."""
    guard = Watch(sf.Guard(), torch.device("cpu"))
    for step, (early_loss, early_norm) in enumerate(rows):
        guard.permit_on_host(early_loss, early_norm, step=step, scaled=False)
    most_loss, most_norm, _ = guard.lets_pass(len(rows))
    for a, b in ((loss, norm), (most_loss, most_norm), (most_loss, norm), (loss, most_norm)):
        if math.isfinite(a) and math.isfinite(b) and a <= most_loss and b <= most_norm:
            decision = guard.judge.decide(a, b)
            assert decision == (0.0, 1.0, False)


@given(
    st.lists(st.tuples(st.floats(0.5, 1.5), st.floats(0.5, 1.5), st.booleans()), min_size=50, max_size=130),
    st.integers(100, 500),
    st.sampled_from([0, 2, 4]),
    st.randoms(use_true_random=True),
)
def test_calm_steps_taken_up_together_are_as_if_one_by_one(rows, rises, young, random):
    """Some are spikes; of the others some are taken up together, as many as are allowed for: also where
    that was asked before those before them were known.
    """
    with mock.patch.object(judge, "YOUNG", young):
        one_by_one, together = (Watch(sf.Guard(), torch.device("cpu")) for _ in range(2))
        rows = [
            (2 * loss if step > rises else loss, 1e6 if spikes and step % 7 == 0 else norm)
            for step, (loss, norm, spikes) in enumerate(3 * rows)
        ]

        def step_by_step(guard, step):
            loss, norm = rows[step]
            permit = guard.permit_on_host(loss, norm, step=step, scaled=False)
            facts = {"loss": loss, "verdict": int(permit.verdict), "permitted": bool(permit.permitted)}
            return guard.review(step=step, expected=False, **facts)

        step, begun, ends = 0, [], False
        while step < len(rows):
            ahead = sum(len(lap) for lap, _ in begun)
            most, bounds = together.calm_after(ahead, step)
            if most and not ends and random.random() < 0.7:
                lap = []
                for loss, norm in rows[step + ahead : step + ahead + random.randint(1, most)]:
                    if loss > bounds[0] or norm > bounds[1]:
                        ends = True
                        break
                    lap.append((loss, norm))
                begun += [(lap, bounds)] if lap else []
            elif begun:
                lap, bounds = begun.pop(0)
                assert bounds == one_by_one.lets_pass(step)
                alarms = [step_by_step(one_by_one, step + i) for i in range(len(lap))]
                step += len(lap)
                assert alarms[:-1] == [None] * (len(lap) - 1)
                assert together.take_calm(step - 1, *map(list, zip(*lap, strict=True))) == alarms[-1]
                assert not (alarms[-1] and begun)
            else:
                assert step_by_step(together, step) == step_by_step(one_by_one, step)
                step, ends = step + 1, False
            assert together.state_dict() == one_by_one.state_dict()
            assert together.lets_pass(step) == one_by_one.lets_pass(step)


ids = st.lists(st.integers(0, 20), min_size=1, max_size=4).map(tuple)
interventions = st.one_of(
    st.builds(
        Intervention,
        st.sampled_from(["quarantine", "release"]),
        st.integers(0, 50),
        st.just(50),
        st.just(0.0),
        ids,
    ),
    st.builds(
        Intervention,
        st.sampled_from(["hold_rate", "cut_rate"]),
        st.integers(0, 50),
        st.just(50),
        st.floats(0.1, 1.0),
    ),
)


@example(
    [Intervention("quarantine", 0, 50, ids=(1,)), Intervention("release", 0, 50, ids=(1,))],
    Intervention("release", 1, 50, ids=(1,)),
    0,
)
@given(st.lists(interventions, max_size=8), interventions, st.integers(0, 60))
def test_what_is_decided_later_changes_no_step_before_it_holds(earlier, more, step):
    history = History(tuple(earlier))
    now = history.with_(more)
    assert History.from_json(now.to_json()).interventions == now.interventions
    if step < more.begins:
        assert now.multiplier(step, 1.0) == history.multiplier(step, 1.0)
        assert now.quarantined(step) == history.quarantined(step)


# ---------------------------------------------------------------------------------- scenarios


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    known = {}

    def get(seed):
        if seed not in known:
            out = tmp_path_factory.mktemp("clean") / "run"
            known[seed] = sf.fit(base(seed, sf.Guard()), out=out).metrics["accuracy"]
            assert sf.open_run(out).summary()["interventions"] == 0
        return known[seed]

    return get


def assert_healed(number, seed, out, clean):
    scenario = BY_NUMBER[number]
    done = play(scenario, seed, sf.Guard(), out)
    if number == 14:
        assert (done.status, done.exit_code) == ("diverged", 3)
        assert "batch norm" in sf.open_run(out).summary()["reason"]
        return
    assert done.status == "finished"
    assert sf.open_run(out).verify() == []
    if number == 7:  # keeps on learning; how far such a network comes is another matter
        assert done.metrics["accuracy"] > CHANCE
    elif number == 12:
        assert done.metrics["loss"] < 0.51  # the optimum is 0.5
    else:
        assert done.metrics["accuracy"] >= 0.98 * clean(seed)
    if number in RESTRAINED:
        assert len(events(out, "rolled_back")) <= 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", sorted(BY_NUMBER))
def test_the_guard_heals(number, seed, tmp_path, clean):
    assert_healed(number, seed, tmp_path / "run", clean)


SEEDS_THAT_FALL_SHORT = {2: 1, 7: 1, 14: 3}
"""Of ten, at most: by a little more than 2 % of the clean run; a recurrent network that learns late; batch
norm over two samples that learns after all.
"""


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", sorted(BY_NUMBER))
def test_the_guard_heals_ten_more_seeds(number, tmp_path, clean):
    short = {}
    for seed in range(3, 13):
        try:
            assert_healed(number, seed, tmp_path / str(seed), clean)
        except AssertionError as error:
            short[seed] = str(error)
            assert sf.open_run(tmp_path / str(seed)).summary()["status"] == "finished"
    assert len(short) <= SEEDS_THAT_FALL_SHORT.get(number, 0), short


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_the_guard_heals_eleven_rows_with_every_seed(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/heal.py", "--out", tmp_path / "heal.json"]
    subprocess.run(command, check=True, capture_output=True)
    rows = {row["row"]: row for row in json.loads((tmp_path / "heal.json").read_text())["rows"]}
    assert sum(row["within_2_percent"] == 10 for row in rows.values()) >= 11
    assert {n: rows[n]["broken_off"] for n in MUST_BREAK} == dict.fromkeys(MUST_BREAK, 10)
    assert max(rows[n]["most_rollbacks"] for n in RESTRAINED) <= 1
    for n in (4, 5, 8):  # not finite
        assert rows[n]["seen"]["in_the_same_step"] == rows[n]["seen"]["strikes"]
    spikes = [rows[n]["seen"] for n in (3, 9, 10, 11)]
    assert sum(s["within_20_steps"] for s in spikes) >= 0.95 * sum(s["strikes"] for s in spikes)
    assert rows[7]["ended"] == {"finished": 10}
    assert min(rows[7]["ratios"]) > 0.2  # chance is 0.1
    assert all("batch norm" in reason for reason in rows[14]["reasons"])
    assert all(ratio == 0.0 or ratio > 0.5 for ratio in rows[14]["ratios"])  # ended, or it does learn


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_that_is_initialised_anew_is_noticed_at_once(tmp_path, seed):
    play(BY_NUMBER[9], seed, sf.Guard(), tmp_path / "run")
    assert events(tmp_path / "run", "skipped")[0]["step"] in (600, 601)


@pytest.mark.parametrize("number", MUST_BREAK)
def test_without_the_guard_it_breaks(number, tmp_path, clean):
    done = play(BY_NUMBER[number], 0, sf.Guard("off"), tmp_path / "run")
    if done.status == "finished":
        assert done.metrics["accuracy"] < 0.9 * clean(0)
    else:
        assert done.status == "diverged"


# ---------------------------------------------------------------------------------- exactly alike


def jump(**changes):
    """The rate is 300 times too high for three steps."""
    schedule = sf.constant(over=500) >> sf.constant(over=3) * 300.0 >> sf.cosine(to=0.1)
    return base(0, sf.Guard(), schedule=schedule, steps=900, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    done = sf.fit(jump(), out=tmp_path_factory.mktemp("undisturbed") / "run")
    assert done.status == "finished"
    (back,) = events(done.run_dir, "rolled_back")
    assert (back["step"], back["cause"]) == (400, "the learning rate jumped")
    return done


OFTEN = Operations(checkpoint={"every": 37}, progress="off")


@pytest.mark.parametrize("stops", [(450, 505), (500, 501, 502), (507, 508), (509, 520, 700)])
def test_an_interrupted_run_heals_alike(tmp_path, undisturbed, stops):
    for stop in stops:
        for outcome in sf.steps(jump(), out=tmp_path / "run", operations=OFTEN):
            if outcome.step == stop and not events(tmp_path / "run", "rolled_back"):
                break
    done = sf.fit(jump(), out=tmp_path / "run", operations=OFTEN)
    assert (done.digest, done.ledger) == (undisturbed.digest, undisturbed.ledger)
    assert len(sf.open_run(tmp_path / "run").log()["step"]) == 900
    assert sf.open_run(tmp_path / "run").verify() == []


def test_a_run_that_is_copied_in_the_middle_of_it_heals_alike(tmp_path, undisturbed):
    """As a kill leaves it: the directory as it is at that instant."""
    copies: list = []
    all_stay = Operations(checkpoint={"every": 37, "keep_last": 100}, progress="off")
    for outcome in sf.steps(jump(), out=tmp_path / "run", operations=all_stay):
        if outcome.step in (505, 508) or (outcome.step in (401, 480) and len(copies) > 1):
            copies.append(copied(tmp_path / "run", tmp_path / f"copy{len(copies)}"))
    assert len(copies) > 3
    for copy in copies:
        done = sf.fit(jump(), out=copy, operations=OFTEN)
        assert (done.digest, done.ledger) == (undisturbed.digest, undisturbed.ledger)
        assert sf.open_run(copy).verify() == []


def test_a_checkpoint_of_a_way_that_was_given_up_is_no_finding(tmp_path):
    """Other updates were applied on the way that was taken instead."""
    operations = sf.Operations(checkpoint={"every": 4, "keep_per": "24h"})
    built = build(BY_NUMBER[7].recipe(0, sf.Guard()), RunFolder(tmp_path / "run"), operations)
    for _ in run_steps(built):
        pass
    view = sf.open_run(tmp_path / "run")
    given_up = [c.step for c in view.checkpoints() if not _then(c).leads_to(view.history(), c.step)]
    assert given_up == [4]
    assert view.verify() == []


def _then(checkpoint):
    return History.from_json(checkpoint.facts()["stateful"]["guard"]["history"])


def test_states_that_are_only_in_the_store_do_as_well(tmp_path, undisturbed):
    built = build(jump(), RunFolder(tmp_path / "run"), OFTEN)
    built.run.healer._fits = False
    for _ in run_steps(built):
        pass
    assert built.run.healer.memory == {}
    done = result(built)
    assert (done.digest, done.ledger) == (undisturbed.digest, undisturbed.ledger)


def test_a_kill_while_healing_is_no_mistake_of_the_machine(tmp_path, undisturbed):
    """The step of the alarm is taken twice from there on: with and without the remedy."""
    built = build(jump(), RunFolder(tmp_path / "run"), OFTEN)

    def killed(alarm, replay, begins):
        raise KeyboardInterrupt

    built.run.healer.heal = killed
    with pytest.raises(KeyboardInterrupt):
        for _ in run_steps(built):
            pass
    done = sf.fit(jump(), out=tmp_path / "run", operations=OFTEN)
    assert (done.digest, done.ledger) == (undisturbed.digest, undisturbed.ledger)
    assert [e["detector"] for e in events(tmp_path / "run", "alarm") if "detector" in e] == []
    assert len(events(tmp_path / "run", "rolled_back")) == 1


def test_a_stop_while_healing_keeps_the_alarm(tmp_path, undisturbed):
    built = build(jump(), RunFolder(tmp_path / "run"), OFTEN)
    heal = built.run.healer.heal

    def asked(alarm, replay, begins):
        built.run.stop.reason = "SIGTERM"
        return heal(alarm, replay, begins)

    built.run.healer.heal = asked
    for _ in run_steps(built):
        pass
    assert built.run.status == "preempted"
    assert not events(tmp_path / "run", "rolled_back")
    done = sf.fit(jump(), out=tmp_path / "run", operations=OFTEN)
    assert (done.digest, done.ledger) == (undisturbed.digest, undisturbed.ledger)


def killed_run(path, rng, kills):
    """The same command again and again, killed around the rollback; how often that came to pass."""
    command = (
        "train",
        ROOT / "tests/recipes/jumping.py",
        "pause_s=0.0002",
        "--workers",
        "2",
        "--out",
        path,
    )
    done = 0
    while True:
        process = surefoot_process(*command, "--set", f"checkpoint.every={rng.choice([1, 7, 50])}")
        try:
            goal = rng.choice([60, 320, 331, 335, 340, 345, 390])
            begun = time.monotonic()
            while done < kills and newest_step(path) < goal and process.poll() is None:
                time.sleep(0.002)
                assert time.monotonic() < begun + 60
            if done < kills:
                time.sleep(rng.uniform(0.0, 0.2))
                process.kill()
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        if process.returncode == 0:
            return done
        assert process.returncode == -signal.SIGKILL, err
        done += 1


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    path = tmp_path_factory.mktemp("never") / "run"
    done = surefoot("train", ROOT / "tests/recipes/jumping.py", "--out", path)
    assert done.returncode == 0, done.stderr
    assert len(events(path, "rolled_back")) == 1
    told = sf.open_run(path).summary()
    assert told["quarantined"] == [77]
    return told


def assert_killed_alike(path, seed, kills, never_killed):
    assert killed_run(path, random.Random(seed), kills) >= 3
    told = sf.open_run(path).summary()
    for name in (
        "status",
        "step",
        "samples",
        "interventions",
        "quarantined",
        "digest",
        "ledger",
        "lineage",
    ):
        assert told[name] == never_killed[name], name
    assert sf.open_run(path).verify() == []


@pytest.mark.timeout(300)
def test_killed_around_a_rollback(tmp_path, never_killed):
    assert_killed_alike(tmp_path / "run", 0, 6, never_killed)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_around_a_rollback_again_and_again(tmp_path, never_killed, seed):
    assert_killed_alike(tmp_path / "run", seed, 15, never_killed)


# ---------------------------------------------------------------------------------- samples


def with_data(changed, x, y, until):
    fields = {name: getattr(changed, name) for name in changed.__dataclass_fields__}
    return sf.Recipe(**(fields | {"data": sf.Arrays(x, y), "until": until}))


@pytest.mark.parametrize(
    "seed",
    [seed if seed in (0, 1, 2, 7) else pytest.param(seed, marks=pytest.mark.soak) for seed in range(13)],
)
def test_bad_samples_are_named_and_few_others(tmp_path, seed):
    """20 of 5,000: not a number; 10,000 times too large and mislabelled. All of them do harm. With seed 7
    one is in the first batch, before which nothing is known to be usual.
    """
    x, y = mixture(7 + seed, 5000)
    calm = sf.fit(with_data(base(seed, sf.Guard()), x, y, "6ep"), out=tmp_path / "clean")
    assert sf.open_run(calm.run_dir).summary()["quarantined"] == []
    bad = np.random.default_rng(seed).permutation(5000)[:20]
    x, y = x.copy(), y.copy()
    x[bad[:10], 3] = np.nan
    x[bad[10:]] *= 1e4
    y[bad[10:]] = (calm.model(torch.tensor(x[bad[10:]])).argmax(1).numpy() + 5) % 10
    done = sf.fit(with_data(base(seed, sf.Guard()), x, y, "6ep"), out=tmp_path / "run")
    found = set(sf.open_run(done.run_dir).summary()["quarantined"])
    assert len(found & set(bad.tolist())) >= 18
    assert len(found - set(bad.tolist())) <= 5
    assert done.status == "finished"
    assert done.metrics["accuracy"] >= 0.99 * calm.metrics["accuracy"]
    assert sf.open_run(done.run_dir).verify() == []


@pytest.mark.parametrize("seed", range(3))
def test_of_bad_samples_of_three_kinds_those_that_do_harm_are_named(tmp_path, seed):
    """A block in which nothing but labels is wrong does no harm, and need not be named."""
    x, y = mixture(7 + seed, 5000)
    calm = sf.fit(with_data(base(seed, sf.Guard()), x, y, "6ep"), out=tmp_path / "clean")
    nan, large = np.split(np.random.default_rng(seed).permutation(4900)[:13], [7])
    block = np.arange(4900, 4907)
    x, y = x.copy(), y.copy()
    x[nan, 3] = np.nan
    x[large] *= 1e4
    y[block] = (y[block] + 5) % 10
    wrong = calm.model(torch.tensor(x[large])).argmax(1).numpy() != y[large]
    harmful = {*nan.tolist(), *large[wrong].tolist()}
    done = sf.fit(with_data(base(seed, sf.Guard()), x, y, "6ep"), out=tmp_path / "run")
    found = set(sf.open_run(done.run_dir).summary()["quarantined"])
    assert len(found & harmful) >= 0.9 * len(harmful)
    assert len(found - {*nan.tolist(), *large.tolist(), *block.tolist()}) <= 5
    assert done.status == "finished"
    assert done.metrics["accuracy"] >= 0.99 * calm.metrics["accuracy"]
    off = sf.fit(with_data(base(seed, sf.Guard("off")), x, y, "6ep"), out=tmp_path / "off")
    assert off.status == "diverged"


@pytest.mark.parametrize(
    ("losses", "usual"),
    [
        ([2.0] * 15 + [2.3], 2.01875),
        ([2.0] * 62 + [3000.0, math.nan], 2.0),  # what stands out, and what is no number
        ([2.0] * 14 + [3000.0], None),  # too few
        ([0.0] * 50 + [2.0] * 14, None),  # too many stand out
        ([math.nan] * 50 + [2.0] * 14, None),
        ([-2.0, -2.1] * 10, -2.05),
    ],
)
def test_the_usual_loss_of_a_batch(losses, usual):
    batch = Minibatch(Slots(0, 0, np.arange(len(losses)), None, len(losses)), None, None, len(losses))
    found = usual_loss(batch, torch.tensor(losses))
    assert math.isnan(found) if usual is None else found == pytest.approx(usual)


def rare(p, sep, lr):
    """Few samples are of the other class, and the model begins with knowing how few: they stand out in
    every batch.
    """
    g = np.random.default_rng(0)
    y = (g.random(64 * 400) < p).astype("float32")
    x = g.normal(size=(len(y), 16)).astype("float32") + y[:, None] * np.float32(sep)

    def model():
        last = torch.nn.Linear(32, 1)
        torch.nn.init.normal_(last.weight, 0, 0.01)
        torch.nn.init.constant_(last.bias, math.log(p / (1 - p)))
        return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), last)

    return sf.Recipe(
        model=model, data=sf.Arrays(x, y[:, None]), optimizer=sf.SGD(lr=lr, momentum=0.9),
        objective=sf.supervised(torch.nn.functional.binary_cross_entropy_with_logits),
        batch=sf.Batch(64), until=400,
    )  # fmt: skip


@pytest.mark.parametrize(("p", "sep", "lr"), [(0.02, 0.6, 0.1), (0.05, 0.9, 1.0)])
def test_samples_that_stand_out_in_every_batch_are_no_reason_for_alarm(tmp_path, p, sep, lr):
    run = sf.open_run(sf.fit(rare(p, sep, lr), out=tmp_path / "run").run_dir)
    assert not [e for e in run.events() if e["kind"] in ("alarm", "rolled_back", "quarantined")]


def test_what_is_left_out_by_then_says_nothing_of_how_the_run_began(tmp_path):
    changed = rare(0.02, 0.6, 0.1)
    (x, y), plan = changed.data.arrays(), Plan(len(changed.data), 64)
    bad = sorted(int(plan.ids(step)[5]) for step in range(1, 11))
    x[bad] = torch.nan
    done = sf.fit(dataclasses.replace(changed, data=sf.Arrays(x, y)), out=tmp_path / "run")
    kinds = {e["kind"] for e in sf.open_run(done.run_dir).events()}
    assert sorted(i for e in events(tmp_path / "run", "quarantined") for i in e["ids"]) == bad
    assert not kinds & {"alarm", "rolled_back"}


@pytest.mark.parametrize("compile", ["off", "on"])
def test_looking_into_a_suspicion_leaves_the_run_as_it_was(tmp_path, monkeypatch, compile):
    looked, reconsidered = [], Healer.reconsidered

    def counted(self, alarm):
        looked.append(alarm.step)
        return reconsidered(self, alarm)

    found = []
    for name, instead in (("looked into", counted), ("not", lambda self, alarm: None)):
        monkeypatch.setattr(Healer, "reconsidered", instead)
        operations = Operations(compute={"compile": compile}, progress="off")
        built = build(rare(0.02, 0.6, 0.1), RunFolder(tmp_path / name), operations)
        for _ in run_steps(built):
            pass
        done, log = result(built), sf.open_run(tmp_path / name).log()
        found.append((done.digest, done.ledger, log["loss"].tolist(), log["grad_norm"].tolist()))
    assert looked
    assert found[0] == found[1]


class Late(torch.nn.Module):
    """Counts its passes in training, and, in a buffer that is not kept, those from the 451st on."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("late", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += 1
            if self.seen > 450:
                self.late += 1
        return self.net(x)


@pytest.mark.parametrize("stops", [(), (300,), (460, 506)])
def test_a_buffer_that_first_changed_after_the_state_gone_back_to_is_put_back(tmp_path, stops):
    jumps = sf.constant(over=500) >> sf.constant() * 100.0
    changed = base(0, sf.Guard(), schedule=jumps, model=Late)
    for stop in stops:
        sf.fit(changed, out=tmp_path / "run", operations=Operations(budget={"updates": stop}))
    done = sf.fit(changed, out=tmp_path / "run")
    (back,) = events(tmp_path / "run", "rolled_back")
    assert (done.status, back["step"]) == ("finished", 400)
    assert done.model.late == done.model.seen - 450


class View(torch.nn.Module):
    """With a buffer that is not kept, and is in the memory of what is."""

    def __init__(self, of):
        super().__init__()
        self.net = mlp()
        self.register_buffer("seen", torch.zeros(1))
        same = self.net[0].weight if "weight" in of else self.seen
        same = same.data if "data" in of else same.detach()  # which count its changes apart, and with it
        self.register_buffer("view", torch.zeros(1) if of == "none" else same[:], persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += 1
            if self.seen > 450:
                self.view.mul_(1.0)
        return self.net(x) * (1 + 1e-4 * self.seen)


@pytest.mark.parametrize("of", ["weight", "weight.data", "buffer", "buffer.data"])
def test_a_buffer_in_the_memory_of_another_goes_back_with_that(tmp_path, of):
    jumps = sf.constant(over=500) >> sf.constant() * 100.0
    changed = base(0, sf.Guard(), schedule=jumps, model=lambda: View(of))
    apart = sf.fit(base(0, sf.Guard(), schedule=jumps, model=lambda: View("none")), out=tmp_path / "apart")
    found = {(apart.status, apart.digest, apart.ledger)}
    for stops in ((), (460, 506), (505,)):
        for stop in (*stops, None):
            budget = {} if stop is None else {"updates": stop}
            done = sf.fit(changed, out=tmp_path / str(stops), operations=Operations(budget=budget))
        assert len(events(tmp_path / str(stops), "rolled_back")) == 1
        found.add((done.status, done.digest, done.ledger))
    assert len(found) == 1


class Grows(torch.nn.Module):
    """A table that is made longer when it is too short, and noted to be."""

    def __init__(self):
        super().__init__()
        self.grow(8)

    def grow(self, length):
        self.length = length
        self.register_buffer("table", torch.ones(length), persistent=False)

    def forward(self, x):
        if x.shape[1] > self.length:
            self.grow(x.shape[1])
        return x * self.table


def test_a_table_that_has_grown_stays_so(tmp_path):
    x, y = mixture(7, 64 * 300)
    first = Plan(len(x), 64).ids(0)[0]
    x[first] *= 1e4
    changed = sf.Recipe(
        model=lambda: torch.nn.Sequential(Grows(), mlp()), data=sf.Arrays(x, y),
        objective=sf.supervised(torch.nn.functional.cross_entropy), optimizer=sf.SGD(lr=0.3, momentum=0.9),
        batch=sf.Batch(64), until=300,
    )  # fmt: skip
    done = sf.fit(changed, out=tmp_path / "run")
    assert done.status == "finished"
    assert events(tmp_path / "run", "rolled_back")[0]["step"] == 0


def test_a_run_that_fails_while_it_is_taken_back_to_its_beginning_stays(tmp_path):
    plan, reads = Plan(64 * 400, 64), []

    class OnceOnly(sf.Arrays):
        def fetch(self, ids):
            reads.append(int(ids[0]))
            if reads.count(reads[-1]) > 1 and reads[-1] == plan.ids(1)[0]:
                raise OSError("the first batches are gone")
            return super().fetch(ids)

    changed = rare(0.02, 0.6, 0.1)
    changed = dataclasses.replace(changed, data=OnceOnly(*changed.data.arrays()))
    with pytest.raises(OSError, match="are gone"):
        sf.fit(changed, out=tmp_path / "run")
    run = sf.open_run(tmp_path / "run")
    assert run.status == "failed"
    assert len(run.log()["loss"]) > 100


def test_a_run_that_is_watched_is_not_taken_back_to_look_into_it(tmp_path):
    changed = dataclasses.replace(rare(0.02, 0.6, 0.1), guard=sf.Guard("watch"))
    built = build(changed, RunFolder(tmp_path / "run"), Operations(progress="off"))
    built.run.healer.initial = built.state.restore = None
    for _ in run_steps(built):
        pass
    assert result(built).status == "finished"
    (told,) = events(tmp_path / "run", "alarm")
    assert told["detector"] == "D6"
    assert of_event(told).action == "none: the guard only watches"


def tuned():
    """A model that has been trained on these samples goes on with a small rate."""
    x, y = mixture(0, 4000)
    torch.manual_seed(0)
    before, inputs, targets = mlp(), torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.Adam(before.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(before(inputs), targets).backward()
        optimizer.step()
    return base(0, sf.Guard(), steps=400, model=lambda: deepcopy(before), optimizer=sf.SGD(lr=1e-4))


def timid():
    return base(0, sf.Guard(), steps=400, optimizer=sf.SGD(lr=1e-5))


def doubtful():
    """Batch norm over two samples, of which the run is warned before it begins."""
    return base(0, sf.Guard(), steps=400, model=batch_normed, size=2, optimizer=sf.SGD(lr=1e-6))


def large():
    """Of so many weights that the size of an update is measured in every 16th step."""
    return base(0, sf.Guard(), steps=250, model=functools.partial(wide, 400), optimizer=sf.SGD(lr=1e-6))


def wide(width):
    return torch.nn.Sequential(
        torch.nn.Linear(32, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU(),
        torch.nn.Linear(width, 10),
    )  # fmt: skip


@pytest.mark.parametrize("changed", [tuned, timid, doubtful, large])
def test_a_run_whose_updates_are_small_is_not_taken_back(tmp_path, monkeypatch, changed):
    """It would cost ten times its first 200 updates, and find nothing."""
    monkeypatch.delattr(Healer, "_again")
    done = sf.fit(changed(), out=tmp_path / "run")
    assert done.status == "finished"
    (told,) = events(tmp_path / "run", "alarm")
    assert told["detector"] == "D6"
    assert of_event(told).action == "none: the updates were too small to have done harm"
    assert not events(tmp_path / "run", "healing")


def test_that_a_run_is_looked_into_is_told_before_and_what_was_tried_after(tmp_path, monkeypatch):
    """Steps are taken again meanwhile, which may take minutes; nothing helps here."""
    shown = []
    monkeypatch.setattr(Healer, "_learns_better", lambda *_: shown.append(now()) or False)

    def now():
        return alarms(list(sf.open_run(tmp_path / "run").events()))

    shuffled = base(0, sf.Guard(), steps=250, optimizer=sf.SGD(lr=0.3))
    x, y = mixture(0, 64 * 250)
    shuffled = with_data(shuffled, x, np.random.default_rng(1).permutation(y), 250)
    sf.fit(shuffled, out=tmp_path / "run")
    assert shown
    assert all(text.startswith("LOOKING INTO the loss is ") for (text,) in shown)
    assert now() == []
    (alarm,) = events(tmp_path / "run", "alarm")
    (began,) = events(tmp_path / "run", "healing")
    assert {k: alarm[k] for k in ("step", "detector", "reason")} == {
        k: began[k] for k in ("step", "detector", "reason")
    }
    assert "0.5 of the rate" in of_event(alarm).action


def test_small_updates_that_make_the_loss_rise_are_looked_into(tmp_path):
    """Of a model whose output is zero at first, and whose inputs are in the thousands."""
    x, y = mixture(0, 256 * 400)
    x *= np.float32(9000)

    def zero_at_first():
        model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        torch.nn.init.zeros_(model[-1].weight)
        return model

    changed = base(
        0, sf.Guard(), steps=400, size=256, model=zero_at_first, optimizer=sf.SGD(lr=5e-7, momentum=0.9)
    )
    done = sf.fit(with_data(changed, x, y, 400), out=tmp_path / "run")
    log = sf.open_run(done.run_dir).log()
    assert [e["detector"] for e in events(tmp_path / "run", "rolled_back")] == ["D6"]
    assert np.median(log["loss"][-50:]) < 1.0


@pytest.mark.parametrize(
    ("ratios", "harm"),
    [
        ([1e-3] * 200, False),
        ([3e-3] * 32 + [1e-5] * 168, True),
        ([3e-3] * 31 + [1e-5] * 169, False),
        ([1e-5] * 199 + [0.2], True),
        ([1e-5] * 199 + [0.05], False),
        ([0.0] * 200, False),
        ([math.nan] * 200, True),
        ([1e-5] * 31, True),
        (([1e-5] + [math.nan] * 15) * 12, False),
        (([3e-3] + [math.nan] * 15) * 2 + ([1e-5] + [math.nan] * 15) * 10, True),
        (([3e-3] + [math.nan] * 15) + ([1e-5] + [math.nan] * 15) * 11, False),
        (([0.2] + [math.nan] * 15) + ([1e-5] + [math.nan] * 15) * 11, True),
    ],
)
def test_which_updates_may_have_done_harm(ratios, harm):
    assert may_have_done_harm(ratios) is may_have_done_harm(ratios[::-1]) is harm


def test_a_run_that_its_first_batch_broke_is_healed_though_single_losses_are_huge(tmp_path):
    """The mean of the last losses would be that of a few, and no remedy better by more than chance."""
    n, g = 64 * 400, np.random.default_rng(1015)
    y = g.integers(0, 10, n)
    centres = np.random.default_rng(0).normal(size=(10, 32)) * 0.55
    x = (centres[y] + g.normal(size=(n, 32))).astype("float32")
    changed = sf.Recipe(
        model=lambda: torch.nn.Sequential(
            torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(),
            torch.nn.Linear(64, 10),
        ),
        data=sf.Arrays(x, y), objective=sf.supervised(torch.nn.functional.cross_entropy),
        optimizer=sf.SGD(lr=0.1), batch=sf.Batch(64), until=400, seed=15,
    )  # fmt: skip
    bad = build(changed, RunFolder(tmp_path / "plan"), Operations()).run.feed.plan.ids(0)[:2]
    x[bad] *= 1e5
    done = sf.fit(changed, out=tmp_path / "run")
    assert sf.open_run(done.run_dir).summary()["quarantined"] == sorted(bad.tolist())
    assert np.median(sf.open_run(done.run_dir).log()["loss"][-50:]) < 0.5


@pytest.mark.parametrize(("seed", "scale"), [(0, 1e3), (3, 1e3)])
def test_a_first_loss_that_a_sample_makes_half_as_high_again_hides_no_collapse(tmp_path, seed, scale):
    x, y = mixture(7 + seed, 5000)
    first = Plan(5000, 64, seed=seed).ids(0)[0]
    x[first] *= scale
    y[first] = (y[first] + 5) % 10
    fast = base(seed, sf.Guard(), optimizer=sf.SGD(lr=0.3, momentum=0.9))
    done = sf.fit(with_data(fast, x, y, "6ep"), out=tmp_path / "run")
    assert [e["detector"] for e in events(tmp_path / "run", "rolled_back")] == ["D6"]
    assert done.metrics["accuracy"] > 0.85


def test_a_sample_that_weighs_nothing_is_not_to_blame_for_the_first_batch(tmp_path):
    x, y = blobs(64 * 200, classes=3)
    changed = recipe(data=sf.Arrays(x, y), batch=sf.Batch(64), optimizer=sf.SGD(lr=0.1), until=400)
    bad, weightless = build(changed, RunFolder(tmp_path / "plan"), Operations()).run.feed.plan.ids(0)[:2]
    weights = np.ones(len(x), np.float32)
    x[[bad, weightless]] *= 1e6
    weights[weightless] = 0.0

    def objective(model, data):
        x, y, weights = data
        return torch.nn.functional.cross_entropy(model(x), y, reduction="none"), weights

    changed = recipe(
        data=sf.Arrays(x, y, weights), objective=objective, batch=sf.Batch(64),
        optimizer=sf.SGD(lr=0.1), until=400,
    )  # fmt: skip
    healer = build(changed, RunFolder(tmp_path / "run"), Operations()).run.healer
    assert healer._suspects_at_first(History(), lambda *of, **how: None) == (bad,)


def test_samples_that_weigh_nothing_say_nothing_of_the_first_loss(fit):
    """Most of them, with a loss of zero: the first loss is that of the others."""

    def objective(model, data):
        x, y = data
        weights = (x[:, 0] > x[:, 0].quantile(0.8)).float()
        losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        return losses * weights, weights

    changed = {"objective": objective, "batch": sf.Batch(64), "optimizer": sf.SGD(lr=0.01), "until": 400}
    run = sf.open_run(fit(**changed).run_dir)
    assert not [e for e in run.events() if e["kind"] in ("alarm", "rolled_back")]


def harder():
    """Sorted data: from step 400 on the targets are far harder."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1200 * 16, 8)).astype("float32")
    y = x @ rng.normal(size=8).astype("float32")
    y[400 * 16 :] += rng.normal(size=800 * 16).astype("float32") * 1.8
    return sf.Recipe(
        model=lambda: torch.nn.Linear(8, 1), data=sf.Arrays(x, y[:, None]), until=1200,
        batch=sf.Batch(16, shuffle=False), objective=sf.supervised(torch.nn.functional.mse_loss),
        optimizer=sf.SGD(lr=0.01, momentum=0.5),
    )  # fmt: skip


def test_a_lasting_rise_that_the_data_explain_is_borne(tmp_path):
    """That is no fault."""
    done = sf.fit(harder(), out=tmp_path / "run")
    assert done.status == "finished", sf.open_run(tmp_path / "run").summary()["reason"]
    borne = events(tmp_path / "run", "borne")
    assert borne
    assert not [e for e in events(tmp_path / "run", "skipped") if e["step"] > borne[0]["step"] + 60]


def test_more_than_some_bad_samples_stop_the_run(tmp_path):
    x, y = blobs(256)
    x[::8, 0] = np.nan
    done = sf.fit(recipe(data=sf.Arrays(x, y), batch=sf.Batch(8)), out=tmp_path / "run")
    assert (done.status, done.exit_code) == ("diverged", 3)
    assert "12 of 256 samples break a step" in sf.open_run(tmp_path / "run").summary()["reason"]


def test_a_quarantined_sample_is_a_hole_and_nothing_else_moves(tmp_path):
    x, y = blobs(256)
    x[5, 0] = np.nan
    settings = {"data": sf.Arrays(x, y), "batch": sf.Batch(16), "until": "3ep"}
    sf.fit(recipe(**settings), out=tmp_path / "run")
    view = sf.open_run(tmp_path / "run")
    assert view.summary()["quarantined"] == [5]
    short = view.log()["step"][view.log()["batch_samples"] == 15]
    holders = [t for t in range(48) if 5 in view.plan.ids(t)]
    assert short.tolist() == holders[1:]
    assert view.log()["step"][~view.log()["permitted"]].tolist() == holders[:1]


# ---------------------------------------------------------------------------------- modes


def test_watching_changes_nothing_and_says_what_it_sees(tmp_path):
    spoil = spoiling(range(500, 505), lambda x, y, ids: x.__setitem__((ids, 0), 300))
    runs = {
        mode: sf.fit(base(0, sf.Guard(mode), spoil=spoil, steps=600), out=tmp_path / mode)
        for mode in ("watch", "off")
    }
    assert runs["watch"].digest == runs["off"].digest
    assert runs["watch"].interventions == 0
    assert events(tmp_path / "watch", "would_skip")[0]["step"] == 500
    assert not events(tmp_path / "off", "would_skip")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"mode": "on"}, "mode = 'on' must be 'heal' or 'watch' or 'off'"),
        ({"rate_cut": 0.0}, "rate_cut must be above 0"),
        ({"max_rollbacks": -1}, "max_rollbacks must not be negative"),
    ],
)
def test_wrong_rules_are_refused(wrong, match):
    with pytest.raises(sf.RecipeError, match=match):
        sf.Guard(**wrong)


def test_a_budget_of_rollbacks(tmp_path):
    changed = base(0, sf.Guard(max_rollbacks=0), schedule=sf.constant(over=500) >> sf.constant() * 100.0)
    done = sf.fit(changed, out=tmp_path / "run")
    assert done.status == "diverged"
    assert "after 0 rollbacks" in sf.open_run(tmp_path / "run").summary()["reason"]


@pytest.mark.parametrize("jump", [715, 760])
def test_an_alarm_that_was_borne_is_not_raised_again_by_replays(tmp_path, jump):
    """Random labels are borne at 608; the rate jumps later, and the replays begin at 600."""
    schedule = sf.constant(over=jump) >> sf.constant(over=3) * 300.0 >> sf.constant()
    noisy = base(0, sf.Guard(), spoil=spoiling(range(600, 640), _mislabel), schedule=schedule)
    done = sf.fit(noisy, out=tmp_path / "run")
    assert done.status == "finished", done.reason
    assert len(events(tmp_path / "run", "borne")) >= 1
    (back,) = events(tmp_path / "run", "rolled_back")
    assert back["step"] == 600 < events(tmp_path / "run", "borne")[0]["step"]
    assert "the learning rate jumped" in back["cause"]
    assert done.metrics["accuracy"] > 0.88
    assert sf.replay_step(noisy, tmp_path / "run", step=1100).verdict == "reproduced"


def test_a_way_back_that_passes_an_alarm_answered_before(tmp_path, monkeypatch):
    """States lie in the store only: the way to 600 begins at 450, and an alarm was borne at 508."""
    monkeypatch.setattr("surefoot.heal._MEMORY_SHARE", 0.0)
    schedule = sf.constant(over=760) >> sf.constant(over=3) * 300.0 >> sf.constant()
    noisy = base(0, sf.Guard(), spoil=spoiling(range(500, 540), _mislabel), schedule=schedule)
    done = sf.fit(noisy, out=tmp_path / "run", operations=sf.Operations(checkpoint={"every": 450}))
    assert done.status == "finished", done.reason
    (back,) = events(tmp_path / "run", "rolled_back")
    assert 450 < events(tmp_path / "run", "borne")[0]["step"] < back["step"] == 600


@pytest.mark.parametrize("host", [True, False])
def test_the_guards_state_survives_json(host):
    def made():
        watch = Watch(sf.Guard(), torch.device("cpu"))
        watch.judge = Judge(torch.device("cpu"), on_host=host)
        return watch

    one, other = made(), made()
    for step in range(100):
        loss, norm = (torch.tensor(x, dtype=torch.float64) for x in (1 / (step + 1), 1.0 + step % 3))
        one.permit(loss, norm, step=step, scaled=False)
        one.review(step=step, loss=loss.item(), verdict=0, permitted=True, expected=False)
    one.layers.look("ab", [1e-9, 1.0])
    one.reviewed.untrained = 0.5
    one.pending = Alarm("D3", 90, 70, "why")
    one.history = one.history.with_(Intervention("quarantine", 3, 2, 0.0, (5,)))
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict()
    assert other.pending == one.pending
    assert one.state_dict()["pending"] is not None


# ---------------------------------------------------------------------------------- D7


def continued_after_a_kill(tmp_path, *, during=None, after=None, **changes):
    """A run that was killed at step 470, its newest state that of 400, and continued; its events."""
    often = {"checkpoint": {"every": 200}, "progress": "off"}
    changed = base(0, sf.Guard(), steps=600, **changes)
    for outcome in sf.steps(changed, out=tmp_path / "run", operations=Operations(**often)):
        if outcome.step == 450 and during is not None:
            during(outcome.model)
        if outcome.step == 470:
            copied(tmp_path / "run", tmp_path / "killed", step=400)
            break
    built = build(changed, RunFolder(tmp_path / "killed"), Operations(**often))
    assert built.state.step == 400
    if after is not None:
        after(built.state)
    for _ in run_steps(built):
        pass
    return result(built)


def spoil(model):
    with torch.no_grad():
        model[4].weight.mul_(1.01)


def spoil_momentum(state):
    for slots in state.optimizer.state.values():
        slots["momentum_buffer"].mul_(1.1)


@pytest.mark.parametrize(
    "harm", [lambda state: spoil(state.model), spoil_momentum], ids=["weights", "momentum"]
)
def test_a_state_that_came_back_wrong_is_noticed_and_undone(tmp_path, harm):
    whole = sf.fit(base(0, sf.Guard(), steps=600), out=tmp_path / "whole")
    done = continued_after_a_kill(tmp_path, after=harm)
    (told,) = events(tmp_path / "killed", "rolled_back")
    assert told["detector"] == "D7"
    assert "does not reproduce" in told["cause"]
    assert (done.status, done.digest, done.ledger) == ("finished", whole.digest, whole.ledger)
    assert sf.open_run(tmp_path / "killed").verify() == []


def test_an_attempt_that_erred_before_it_was_killed_is_told_of(tmp_path):
    whole = sf.fit(base(0, sf.Guard(), steps=600), out=tmp_path / "whole")
    done = continued_after_a_kill(tmp_path, during=spoil)
    (told,) = events(tmp_path / "killed", "alarm")
    assert (told["detector"], told["step"]) == ("D7", 452)
    assert events(tmp_path / "killed", "rolled_back") == []
    assert (done.status, done.digest) == ("finished", whole.digest)
    *_, newest = sorted((tmp_path / "killed/checkpoints").glob("*/state.json"))
    review = json.loads(newest.read_text())["stateful"]["guard"]["review"]
    assert review["told_slow"] is False  # of D6, which has nothing to do with it


def test_a_run_that_comes_back_right_is_left_alone(tmp_path):
    done = continued_after_a_kill(tmp_path)
    assert events(tmp_path / "killed", "alarm") == events(tmp_path / "killed", "rolled_back") == []
    assert done.interventions == 0


@pytest.mark.parametrize(("first", "second"), [(None, 24), (24, None), (12, 11)])
def test_another_physical_batch_is_no_fault_of_the_machine(tmp_path, first, second):
    """A ragged tail takes one pass either way, and its row comes out with other bits."""
    x, y = mixture(0, 500)
    changed = {"data": sf.Arrays(x, y), "batch": sf.Batch(32), "until": 200, "schedule": sf.constant()}
    ragged = base(0, sf.Guard(), **{k: v for k, v in changed.items() if k != "until"}, steps=200)

    def operations(physical):
        return Operations(checkpoint={"every": 50}, compute={"micro_batch": physical}, progress="off")

    for outcome in sf.steps(ragged, out=tmp_path / "run", operations=operations(first)):
        if outcome.step == 90:
            copied(tmp_path / "run", tmp_path / "killed", step=50)
            break
    sf.fit(ragged, out=tmp_path / "killed", operations=operations(second))
    assert events(tmp_path / "killed", "rolled_back") == events(tmp_path / "killed", "alarm") == []
    for step in (15, 95, 130):
        assert sf.replay_step(ragged, tmp_path / "killed", step=step).verdict in ("reproduced", "agrees")
