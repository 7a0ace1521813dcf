"""What an attack on compiled steps that are settled together found: each of these went wrong once."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, copied, mlp, recipe

import surefoot as sf
from surefoot import calm, clock
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.guard.detect import FINE, NOT_FINITE, SAT_OUT
from surefoot.guard.history import Intervention
from surefoot.guard.review import Review
from surefoot.guard.watch import Watch
from surefoot.operations import Operations
from surefoot.record.folder import RunFolder
from surefoot.stopping import NoLongerWaiting, StopRequest


def compiled(**more):
    return Operations(compute={"compile": "on"}, progress="off", **more)


def eager():
    return Operations(compute={"compile": "off"}, progress="off")


def events(run, kind):
    return [e for e in sf.open_run(run).events(all_events=True) if e["kind"] == kind]


class Fetching(sf.Arrays):
    """Arrays; `seen` is called with each batch's number and data, and may give other data."""

    def __init__(self, *arrays, seen, **named):
        super().__init__(*arrays, **named)
        self.seen, self.num = seen, 0

    def fetch(self, ids):
        data = super().fetch(ids)
        self.num += 1
        return self.seen(self.num, data) or data


def test_a_loss_of_minus_infinity_is_refused_everywhere(tmp_path):
    x, y = blobs(6000)

    def objective(model, data):
        x, y = data
        return F.cross_entropy(model(x), y, reduction="none") + 0.01 * torch.log(x[:, 0].abs()).detach()

    def changed():
        return recipe(objective=objective, data=sf.Arrays(x, y), batch=sf.Batch(20), until=295)

    before = sf.fit(changed(), out=tmp_path / "before", operations=compiled(budget={"updates": 1}))
    x[sf.open_run(before.run_dir).plan.ids(257)[3], 0] = 0.0
    for name, operations in {"eager": Operations(compute={"compile": "off"}), "calm": compiled()}.items():
        sf.fit(changed(), out=tmp_path / name, operations=operations)
    for _ in sf.steps(changed(), out=tmp_path / "steps", operations=compiled()):
        pass
    for name in ("eager", "calm", "steps"):
        log = sf.open_run(tmp_path / name).log()
        assert log["loss"][257] == -math.inf
        assert (log["permitted"][257], log["verdict"][257]) == (0, NOT_FINITE)
        assert [e["step"] for e in events(tmp_path / name, "quarantined")] == [257]


@pytest.mark.parametrize("num", [195, 200])
def test_a_check_that_falls_on_a_short_batch_is_made_after_it(tmp_path, num):
    settings = SimpleNamespace(scale=1.0)

    def objective(model, data):
        return settings.scale * F.cross_entropy(model(data[0]), data[1], reduction="none")

    def seen(num, data):
        settings.scale = 3.0 if num > 80 else 1.0

    data = Fetching(*blobs(num), seen=seen)
    changed = recipe(objective=objective, data=data, batch=sf.Batch(20), until=850)
    sf.fit(changed, out=tmp_path / "run", operations=compiled())
    (told,) = events(tmp_path / "run", "uncompiled")
    assert told["step"] in (799, 800)


@pytest.mark.parametrize(
    "other",
    [
        lambda data: {"b": data["b"], "a": data["a"]},
        lambda data: {"a": data["a"].clone().requires_grad_(), "b": data["b"]},
        lambda data: {"a": data["a"].numpy(), "b": data["b"]},
    ],
    ids=["order of keys", "gradient", "no tensor"],
)
def test_batches_in_another_form_are_taken_eagerly(tmp_path, other):
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))

    def objective(model, data):
        return (model(torch.as_tensor(data["a"])) - data["b"]).square().mean(1)

    def run(name, operations):
        data = Fetching(seen=lambda num, data: other(data) if num % 5 == 0 else None, a=x, b=x.flip(1))
        done = sf.fit(
            recipe(model=lambda: mlp(classes=8), objective=objective, data=data, until=150),
            out=tmp_path / name,
            operations=operations,
        )
        return done, sf.open_run(done.run_dir).log()["loss"]

    _, eager = run("eager", Operations(compute={"compile": "off"}, progress="off"))
    _, whole = run("compiled", compiled())
    np.testing.assert_allclose(whole, eager, rtol=1e-4)
    assert not events(tmp_path / "compiled", "uncompiled")


def test_no_row_waits_while_a_source_makes_a_batch(tmp_path):
    rows, log = [], []

    def seen(num, data):
        rows.append(len(log[0]) if log else 0)

    built = build(
        recipe(data=Fetching(*blobs(200), seen=seen), batch=sf.Batch(20), until=150),
        RunFolder(tmp_path / "run"),
        compiled(),
    )
    rows.clear()
    log.append(built.run.record._log)
    for _ in run_steps(built):
        pass
    assert rows == list(range(150))


def counted(built, monkeypatch):
    """How many steps were taken as calm ones."""
    settle, num = calm.settle_calm, [0]

    def counting(run, taken, **times):
        num[0] += len(taken)
        return settle(run, taken, **times)

    with monkeypatch.context() as patch:
        patch.setattr(calm, "settle_calm", counting)
        patch.setattr(clock, "AHEAD_S", 60.0)
        for _ in run_steps(built):
            pass
    return num[0]


@pytest.mark.parametrize("mode", ["heal", "off"])
def test_a_run_that_was_killed_goes_on_with_calm_steps(tmp_path, monkeypatch, mode):
    changed = recipe(guard=sf.Guard(mode), until=900)
    for outcome in sf.steps(changed, out=tmp_path / "run", operations=compiled(checkpoint={"every": 300})):
        if outcome.step == 350:
            copied(tmp_path / "run", tmp_path / "copy", step=300)
    built = build(changed, RunFolder(tmp_path / "copy"), compiled())
    assert built.run.before
    assert counted(built, monkeypatch) > 300


def test_one_step_after_a_validation_is_an_ordinary_one(tmp_path, monkeypatch):
    changed = recipe(until=900, validation=sf.Validation(sf.Arrays(*blobs(20)), every=20))
    assert counted(build(changed, RunFolder(tmp_path / "run"), compiled()), monkeypatch) > 600


def test_time_for_the_guard_is_no_waiting_for_data(tmp_path, monkeypatch):
    take, slept = Watch.take_calm, [0.0]

    def slow(*of):
        slept[0] += 0.1
        time.sleep(0.1)
        return take(*of)

    monkeypatch.setattr(Watch, "take_calm", slow)
    sf.fit(recipe(until=600), out=tmp_path / "run", operations=compiled())
    log = sf.open_run(tmp_path / "run").log()
    assert slept[0] > 0.1
    assert log["data_wait_s"].sum() < 0.2 * slept[0] < log["step_s"].sum()


def test_the_times_of_rows_add_up_to_those_of_the_run(tmp_path, monkeypatch):
    validation = sf.Validation(sf.Arrays(*blobs(20)), every=300)
    built = build(recipe(until=900, validation=validation), RunFolder(tmp_path / "run"), compiled())
    assert counted(built, monkeypatch) > 600
    log = sf.open_run(tmp_path / "run").log()
    between = np.abs(np.diff(log["time_s"]) - log["wall_s"][1:])
    assert np.median(between) < 1e-5  # of steps settled together it is the same clock
    assert log["wall_s"][1:].sum() < 1.2 * (log["time_s"][-1] - log["time_s"][0])
    np.testing.assert_allclose(log["step_s"].sum(), built.run.state.elapsed_s, rtol=1e-9)
    assert (log["data_wait_s"] >= 0).all()
    assert log["data_wait_s"][log["step"] % 300 == 0].min() > 0  # nothing is fetched during a validation
    assert (log["data_wait_s"] <= log["step_s"]).all()
    assert (log["step_s"] <= log["wall_s"]).all()
    after_validations = log["wall_s"] > log["step_s"]
    assert {300, 600} <= set(log["step"][after_validations].tolist())


def test_a_profile_ends_with_its_steps(tmp_path, monkeypatch):
    built = build(recipe(until=600), RunFolder(tmp_path / "run"), compiled(profile=3))
    assert counted(built, monkeypatch) > 300
    assert len(events(tmp_path / "run", "profiled")) == 1


def test_the_optimizer_has_the_rate_of_the_last_step(tmp_path, monkeypatch):
    settle = calm.settle_calm

    def stopped(run, taken, **times):
        run.stop.reason = "SIGTERM"
        return settle(run, taken, **times)

    monkeypatch.setattr(calm, "settle_calm", stopped)
    built = build(recipe(schedule=sf.linear(), until=600), RunFolder(tmp_path / "run"), compiled())
    for _ in run_steps(built):
        pass
    assert built.run.status == "preempted"
    group, *_ = built.run.parts.updater.optimizer.param_groups
    assert group["lr"] == sf.open_run(tmp_path / "run").log()["lr"][-1]


def test_steps_that_were_not_finite_count_in_a_row_only():
    review = Review()
    rows = [NOT_FINITE] * 3 + [FINE] * 200 + [NOT_FINITE]
    alarms = [
        review.look(step=step, loss=1.0 - step * 4e-3, verdict=verdict, expected=False, bears=step < 3)
        for step, verdict in enumerate(rows)
    ]
    assert alarms == [None] * len(rows)


def test_an_interrupt_while_a_state_is_handed_over_leaves_the_run_in_order(tmp_path):
    built = build(recipe(until=60), RunFolder(tmp_path / "run"), Operations(checkpoint={"every": 20}))
    submit = built.run.keeper.writer.submit

    def interrupted(*of):
        submit(*of)
        raise KeyboardInterrupt

    built.run.keeper.writer.submit = interrupted
    with pytest.raises(KeyboardInterrupt):
        for _ in run_steps(built):
            pass
    (ended,) = events(tmp_path / "run", "ended")
    assert ended["status"] == "preempted"
    assert sf.fit(recipe(until=60), out=tmp_path / "run").status == "finished"


class Weighing:
    """Weights are booleans, or numbers where a batch has none: with sums of different dtypes."""

    def weigh(self, data):
        some = data["weight"]
        return some if bool(some.any()) else torch.ones(len(some))

    def __call__(self, model, data):
        losses = F.cross_entropy(model(data["x"]), data["y"], reduction="none")
        return losses, torch.where(data["weight"].any(), data["weight"].float(), torch.ones(len(losses)))


def a_factor_now_and_then(num, data):
    """Not in the first batch."""
    return None if data["y"][0] == blobs(200)[1][0] else {**data, "factor": 2.0 + float(data["y"][1])}


def factored(model, data):
    return F.cross_entropy(model(data["x"]), data["y"], reduction="none") * data.get("factor", 1.0)


@pytest.mark.parametrize(
    ("objective", "seen"),
    [(Weighing(), lambda num, data: None), (factored, a_factor_now_and_then)],
    ids=["dtype of the weight", "a number in the batch"],
)
def test_what_a_batch_brings_beside_tensors_is_no_constant(tmp_path, objective, seen):
    x, y = blobs(200)
    weight = ~(np.arange(200) % 40 < 20)

    def losses(name, operations):
        data = Fetching(seen=seen, x=x, y=y, weight=weight)
        batch = sf.Batch(20, shuffle=False)
        changed = recipe(objective=objective, data=data, batch=batch, until=120)
        sf.fit(changed, out=tmp_path / name, operations=operations)
        return sf.open_run(tmp_path / name).log()["loss"]

    eager = losses("eager", Operations(compute={"compile": "off"}, progress="off"))
    np.testing.assert_allclose(losses("compiled", compiled()), eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [sf.SGD(lr=0.1), sf.SGD(lr=0.1, momentum=0.9), sf.AdamW(lr=0.01)],
    ids=["plain", "momentum", "AdamW"],
)
def test_a_first_batch_that_is_not_finite_does_not_hinder(spec, tmp_path):
    x, y = blobs()
    plan = build(recipe(), RunFolder(tmp_path / "plan"), sf.Operations()).run.feed.plan
    x[plan.at(0).ids[3]] = np.nan
    changed = recipe(data=sf.Arrays(x, y), optimizer=spec, until=300)
    built = build(changed, RunFolder(tmp_path / "run"), compiled())
    assert built.notes[0].startswith("compiled: the whole step")
    for _ in run_steps(built):
        pass
    assert built.run.status == "finished"
    sf.fit(changed, out=tmp_path / "eager", operations=eager())
    whole, one_by_one = (sf.open_run(tmp_path / name).log() for name in ("run", "eager"))
    assert whole["permitted"].tolist() == one_by_one["permitted"].tolist() == [0] + 299 * [1]
    np.testing.assert_allclose(whole["loss"][1:], one_by_one["loss"][1:], rtol=1e-3)


def test_a_first_update_that_overflows_ends_a_compiled_run_as_an_eager_one(tmp_path):
    changed = recipe(optimizer=sf.SGD(lr=1e30, momentum=0.9), schedule=sf.constant(), until=300)
    ends = [
        sf.fit(changed, out=tmp_path / name, operations=operations)
        for name, operations in (("compiled", compiled()), ("eager", eager()))
    ]
    assert [(end.status, end.step) for end in ends] == 2 * [("diverged", 0)]


def test_the_first_updates_of_a_compiled_run_may_be_sat_out(tmp_path):
    sat_out = Intervention("sit_out", 0, 0, 40.0)
    built = build(recipe(optimizer=sf.AdamW(lr=0.01), until=300), RunFolder(tmp_path / "run"), compiled())
    built.run.parts.guard.history = built.run.parts.guard.history.with_(sat_out)
    for _ in run_steps(built):
        pass
    assert sf.open_run(tmp_path / "run").log()["verdict"].tolist() == 40 * [SAT_OUT] + 260 * [FINE]


def test_a_first_step_in_fp16_that_overflows_is_tried_again_at_a_lower_scale(tmp_path):
    def objective(model, data):
        return 100.0 * F.cross_entropy(model(data[0]), data[1], reduction="none")

    changed = recipe(
        objective=objective, precision="fp16", optimizer=sf.SGD(lr=1e-4, momentum=0.9), until=100
    )
    built = build(changed, RunFolder(tmp_path / "run"), compiled())
    assert built.notes[0].startswith("compiled: the whole step")
    for _ in run_steps(built):
        pass
    permitted = sf.open_run(tmp_path / "run").log()["permitted"]
    assert permitted[0] == 0
    assert permitted[20:].all()


def test_batches_of_which_none_can_be_applied_are_named_as_the_reason(tmp_path):
    x, y = blobs()
    changed = recipe(data=sf.Arrays(np.full_like(x, np.nan), y))
    built = build(changed, RunFolder(tmp_path / "run"), compiled())
    assert "no update of the first batches is applied" in built.notes[0]
    for _ in run_steps(built):
        pass
    assert built.run.status != "failed"


def test_a_signal_between_the_last_look_and_the_wait_for_a_batch_ends_the_wait():
    stop = StopRequest(reason="SIGTERM")
    with pytest.raises(NoLongerWaiting):
        clock.next_batch(clock.Batches(iter([None])), stop, clock.Clock())
    assert not stop.waiting


def test_refusals_in_a_row_end_with_a_fine_step():
    watch = Watch(sf.Guard("off"), torch.device("cpu"))
    watch.review(step=0, loss=math.nan, verdict=NOT_FINITE, permitted=False, expected=False)
    assert watch.num_refused_in_a_row == 1
    assert watch.review_calm(1, [0.5]) is None
    assert watch.num_refused_in_a_row == 0
