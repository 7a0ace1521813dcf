"""Weights, or what the optimizer keeps for them, are damaged once, by the machine: wherever in a run, it
goes back and ends with the bits of a run that nothing happened to.
"""

import functools
import math
import shutil
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from conftest import blobs, mlp, recipe, surefoot
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_heal import events, harder, jump
from torch import nn

import surefoot as sf
from surefoot import build as surefoot_build
from surefoot.api import result, run_steps
from surefoot.build import build
from surefoot.checkpoint.kept import Checkpoint
from surefoot.measure.readings import Readings
from surefoot.optim.finite import are_finite, have_nan
from surefoot.record import rows
from surefoot.record.folder import RunFolder
from surefoot.record.incidents import of_event

EAGER = sf.Operations(compute={"compile": "off"}, progress="off")
SHORT, LONG = 170, 430


def training(total=SHORT, **changes):
    validation = sf.Validation(sf.Arrays(*blobs(seed=1)), every=60)
    return recipe(validation=validation, until=total, **changes)


@functools.cache
def undisturbed(total, kind, tmp):
    return sf.fit(training(total, optimizer=OPTIMIZERS[kind]), out=tmp / f"undisturbed-{total}-{kind}")


OPTIMIZERS = {"sgd": sf.SGD(lr=0.1, momentum=0.9), "adamw": sf.AdamW(lr=0.01)}
STATE = {"sgd": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq"]}
VALUES = [math.nan, math.inf, -math.inf, 3e38]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


def damaged(run, where, value):
    """One number becomes `value`: of a layer's weight, or of what the optimizer keeps for it."""
    weight = list(run.parts.model.parameters())[-2]
    tensor = weight.detach() if where == "weight" else run.state.optimizer.state[weight][where]
    tensor.view(-1)[5] = value


def play(out, at, where, value, *, total=SHORT, kind="sgd", stops=(), operations=EAGER):
    """Trains, with damage after the step `at`, left after some steps and continued."""
    done = False
    for stop in [*stops, None]:
        built = build(training(total, optimizer=OPTIMIZERS[kind]), RunFolder(out), operations)
        built.run.alone = False
        for outcome in run_steps(built):
            if outcome.step == at and not done:
                done = True
                damaged(built.run, where, value)
            if outcome.step == stop:
                break
    return result(built)


@settings(max_examples=18, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_a_damaged_state_is_undone_wherever_it_comes(tmp, tmp_path_factory, data):
    total = data.draw(st.sampled_from([SHORT, LONG]), "total")
    kind = data.draw(st.sampled_from(sorted(OPTIMIZERS)), "kind")
    places = ["weight", *STATE[kind]]
    at = data.draw(st.one_of(st.integers(0, total - 1), st.integers(total - 6, total - 1)), "at")
    where, value = data.draw(st.sampled_from(places), "where"), data.draw(st.sampled_from(VALUES), "value")
    if where in STATE[kind] and value in (3e38, -math.inf):  # it is finite, or no square
        value = math.inf
    stops = data.draw(st.sets(st.integers(at, min(at + 6, total - 1)), max_size=2), "stops")
    out = tmp_path_factory.mktemp("damaged") / "run"
    every = data.draw(st.sampled_from([1, 37, 1000]), "every")
    often = sf.Operations(compute={"compile": "off"}, progress="off", checkpoint={"every": every})
    done = play(out, at, where, value, total=total, kind=kind, stops=sorted(stops), operations=often)
    assert done.status == "finished"
    assert done.digest == undisturbed(total, kind, tmp).digest
    assert sf.open_run(out).verify() == []


@pytest.mark.parametrize("value", VALUES)
def test_damage_in_the_last_step_is_undone(tmp, tmp_path, value):
    done = play(tmp_path / "run", SHORT - 1, "weight", value)
    assert (done.status, done.digest) == ("finished", undisturbed(SHORT, "sgd", tmp).digest)
    (back,) = events(tmp_path / "run", "rolled_back")
    assert back["detector"] == "D0"
    assert "the machine made a mistake" in back["cause"]
    assert done.metrics == undisturbed(SHORT, "sgd", tmp).metrics


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38])
def test_updates_that_overflow_whatever_the_batch_are_undone(tmp, tmp_path, value):
    """Loss and gradient are fine, so on batches from before the weights do as well as ever."""
    done = play(tmp_path / "run", 80, "momentum_buffer", value)
    assert (done.status, done.digest) == ("finished", undisturbed(SHORT, "sgd", tmp).digest)
    (back,) = events(tmp_path / "run", "rolled_back")
    assert (back["detector"], back["at"]) == ("D5", 84)
    assert len(events(tmp_path / "run", "skipped")) == 4


def test_a_run_that_was_left_with_no_sound_state_begins_anew(tmp_path):
    """All that it has kept by then is poisoned."""
    for outcome in sf.steps(training(), out=tmp_path / "run", operations=EAGER):
        if outcome.step == 7:
            outcome.model[0].weight.detach().fill_(math.nan)
            break
    view = sf.open_run(tmp_path / "run")
    assert view.status == "preempted"
    assert [c.manifest()["poisoned"] for c in view.checkpoints()] == [True]
    refused = surefoot("release", tmp_path / "run", "--all")
    assert "is poisoned" in refused.stderr
    assert "Continue the run first" in refused.stderr
    done = sf.fit(training(), out=tmp_path / "run", operations=EAGER)
    straight = sf.fit(training(), out=tmp_path / "straight", operations=EAGER)
    assert (done.status, done.digest, done.ledger) == ("finished", straight.digest, straight.ledger)
    (told,) = events(tmp_path / "run", "checkpoint_rejected")
    assert "is poisoned" in told["reason"]
    assert of_event(told).action == "the run began anew, since it had kept no other"
    assert "disk" not in of_event(told).advice
    assert view.verify() == []


def test_a_run_whose_sound_states_are_lost_does_not_begin_anew(tmp_path):
    often = sf.Operations(compute={"compile": "off"}, progress="off", checkpoint={"every": 5})
    for outcome in sf.steps(training(), out=tmp_path / "run", operations=often):
        if outcome.step == 7:
            outcome.model[0].weight.detach().fill_(math.nan)
            break
    sound, poisoned = sf.open_run(tmp_path / "run").checkpoints()
    assert poisoned.manifest()["poisoned"]
    shutil.rmtree(sound.path)
    with pytest.raises(sf.SurefootError, match="none is sound"):
        sf.fit(training(), out=tmp_path / "run", operations=EAGER)


class Scaled(nn.Module):
    """With a parameter of no dimensions, a weight that is not trained, a mask of -inf, and a batch norm."""

    def __init__(self):
        super().__init__()
        self.frozen, self.net, self.norm = nn.Linear(8, 8), mlp(), nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.mask = nn.Parameter(torch.full((2,), -torch.inf), requires_grad=False)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x):
        return self.net(self.norm(self.frozen(x))) * self.scale


class Held(torch.optim.SGD):
    """Keeps its momentum as a parameter, and large numbers in half precision beside it."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                kept = self.state[p]
                if not kept:
                    kept["momentum"] = nn.Parameter(torch.zeros_like(p), requires_grad=False)
                    kept["large"] = torch.full((3,), 30_000.0, dtype=torch.float16)
                    kept["least"] = torch.tensor(torch.inf)
                    kept["tiny"] = torch.ones(2).to(torch.float8_e4m3fn)
                if p.grad is not None:
                    p.data.add_(kept["momentum"].mul_(0.9).add_(p.grad), alpha=-group["lr"])


def places(run):
    model, state = run.parts.model, run.state.optimizer.state
    of_scale = state[model.scale]
    return {
        "frozen": lambda: model.frozen.weight.data,
        "running mean": lambda: model.norm.running_mean,
        "scale": lambda: model.scale.data,
        "kept of the scale": lambda: of_scale.get("exp_avg", of_scale.get("momentum")),
        "a weight's count": lambda: state[model.net[0].weight]["step"],
        "kept of a weight": lambda: next(iter(state[model.net[0].weight].values())),
    }


@pytest.mark.parametrize("at", [40, 57, 59])
@pytest.mark.parametrize(
    ("optimizer", "place"),
    [("adamw", p) for p in ("frozen", "running mean", "scale", "kept of the scale", "a weight's count")]
    + [("held", p) for p in ("kept of a weight", "kept of the scale")],
)
@pytest.mark.parametrize("stops", [False, True])
def test_it_is_undone_in_all_that_a_model_and_an_optimizer_keep(tmp_path, optimizer, place, at, stops):
    kinds = {"adamw": sf.AdamW(lr=0.01), "held": lambda params: Held(params, lr=0.05)}
    settings = {"model": Scaled, "total": 60, "optimizer": kinds[optimizer]}
    straight = sf.fit(training(**settings), out=tmp_path / "straight", operations=EAGER)
    done = False
    for stop in [at, None] if stops else [None]:
        built = build(training(**settings), RunFolder(tmp_path / "run"), EAGER)
        built.run.alone = False
        for outcome in run_steps(built):
            if outcome.step == at and not done:
                done = True
                places(built.run)[place]().view(-1)[:1] = math.nan
            if outcome.step == stop:
                break
    assert result(built).status == straight.status == "finished"
    assert result(built).digest == straight.digest
    kept = [v for slots in built.run.state.optimizer.state.values() for v in slots.values()]
    assert not any(v.float().isnan().any() for v in kept)
    assert sf.open_run(tmp_path / "run").verify() == []


@pytest.mark.parametrize(
    ("values", "finite", "nan"),
    [
        (9 * [torch.full((3,), 30_000.0, dtype=torch.float16)], True, False),
        (3 * [torch.full((3,), 2e38)], True, False),
        ([torch.ones(2), torch.tensor([1.0, -math.inf])], False, False),
        ([torch.ones(2), torch.tensor([math.inf, math.nan]).bfloat16()], False, True),
        ([nn.Parameter(torch.tensor([math.nan]))], False, True),
        ([torch.tensor([1.0 + 1j * math.inf])], False, False),
        ([torch.empty(0), torch.ones(2).to(torch.float8_e4m3fn), torch.tensor([1]), "text"], True, False),
        ([torch.tensor([0.0, math.inf]).to_sparse()], True, False),
    ],
)
def test_how_tensors_are_looked_at(values, finite, nan):
    assert are_finite(values, torch.device("cpu")) == finite
    assert have_nan(values, torch.device("cpu")) == nan


@pytest.mark.parametrize("guard", ["heal", "watch"])
def test_what_a_model_is_made_with_is_no_damage(tmp_path, guard):
    """Frozen weights and running statistics that are NaN from the start, and a mask."""

    def made():
        model = Scaled()
        model.norm.running_var[3] = math.nan
        model.spare = nn.Parameter(torch.full((3,), torch.nan), requires_grad=False)
        return model

    settings = {"model": made, "total": 230, "guard": sf.Guard(guard)}
    for outcome in sf.steps(training(**settings), out=tmp_path / "run", operations=EAGER):
        if outcome.step == 210:
            break
    assert sf.fit(training(**settings), out=tmp_path / "run", operations=EAGER).status == "finished"
    assert not events(tmp_path / "run", "rolled_back")


@pytest.mark.parametrize("every", [1, 3])
def test_one_fault_costs_one_rollback(tmp, tmp_path, every):
    """Though states that were given up are being written meanwhile; so two do not spend the budget."""
    often = sf.Operations(compute={"compile": "off"}, progress="off", checkpoint={"every": every})
    built = build(training(optimizer=OPTIMIZERS["adamw"]), RunFolder(tmp_path / "run"), often)
    faults = {40, 120}
    built.run.alone = False
    for outcome in run_steps(built):
        if outcome.step in faults:
            faults.remove(outcome.step)
            damaged(built.run, "exp_avg", math.nan)
    assert result(built).status == "finished"
    assert result(built).digest == undisturbed(SHORT, "adamw", tmp).digest
    assert len(events(tmp_path / "run", "rolled_back")) == 2


def test_a_run_of_a_few_updates_that_all_overflow_is_not_finished(tmp_path):
    for total in (1, 2, 3):
        done = sf.fit(training(total, optimizer=sf.SGD(lr=1e30)), out=tmp_path / str(total))
        assert done.status == "diverged"
        (told,) = events(done.run_dir, "diverged")
        assert f"the last {total} updates were not finite" in told["reason"]


def test_a_caller_that_leaves_when_the_run_has_diverged_is_told_so(tmp_path):
    settings = {"optimizer": sf.SGD(lr=1e30), "guard": sf.Guard(max_refused_in_a_row=3)}
    for outcome in sf.steps(training(**settings), out=tmp_path / "run", operations=EAGER):
        if outcome.step == 2:
            break
    assert sf.open_run(tmp_path / "run").status == "diverged"


def test_the_ledger_of_the_poisoned_state_that_a_run_ended_with_is_looked_at(tmp_path):
    for outcome in sf.steps(training(guard=sf.Guard("off")), out=tmp_path / "run", operations=EAGER):
        if outcome.step == 7:
            outcome.model[0].weight.detach().fill_(math.nan)
            break
    view = sf.open_run(tmp_path / "run")
    assert view.status == "diverged"
    assert view.checkpoints()[-1].manifest()["poisoned"]
    facts = view.checkpoints()[-1].facts()
    with mock.patch.object(Checkpoint, "facts", return_value=facts | {"ledger": "0" * 64}):
        assert "the ledger is 0000" in view.verify()[0].what


def test_remedies_after_which_the_last_updates_overflow_again_are_none(tmp_path):
    """Of so short a run nothing is known to be a calm rate, and a 64th of this one is too high as well."""
    schedule = sf.constant(over=SHORT - 2) >> sf.constant(over=2) * 1e38
    done = sf.fit(training(schedule=schedule), out=tmp_path / "run", operations=EAGER)
    assert done.status == "finished"
    (back,) = events(tmp_path / "run", "rolled_back")
    assert "sat out" in back["remedy"]
    assert "0.5 of the rate" in back["tried"]


def test_a_refused_row_of_a_log_without_verdicts_is_not_said_to_have_overflowed(tmp_path):
    """Versions before wrote none."""
    x, y = blobs()
    x[5] = math.nan
    for outcome in sf.steps(training(data=sf.Arrays(x, y)), out=tmp_path / "run", operations=EAGER):
        if outcome.step == 20:
            break

    def read(folder):
        found = rows.read_log(folder)
        del found.columns["verdict"]
        return found

    with mock.patch.object(surefoot_build, "read_log", read):
        built = build(training(data=sf.Arrays(x, y)), RunFolder(tmp_path / "run"), EAGER)
    kept = built.run.healer.rows
    assert [row.permitted for row in kept].count(False) == 1
    assert not any(row.overflowed for row in kept)
    built.run.record.close()


@pytest.mark.parametrize("mode", ["heal", "watch"])
def test_updates_that_overflow_each_time_are_no_mistake_of_the_machine(tmp_path, mode):
    done = sf.fit(training(optimizer=sf.SGD(lr=1e30), guard=sf.Guard(mode)), out=tmp_path / "run")
    assert done.status == "diverged"
    (told,) = events(tmp_path / "run", "diverged")
    if mode == "heal":
        assert "4 steps in a row were not finite (step 3)" in told["reason"]
        assert "0.5 of the rate" in told["reason"]
    else:
        assert "50 updates in a row were refused" in told["reason"]
        assert events(tmp_path / "run", "alarm")[0]["detector"] == "D5"


@pytest.mark.parametrize(("first", "steps"), [(320, 5), (LONG - 2, 2)], ids=["amid", "at the end"])
def test_a_rate_at_which_updates_overflow_is_held(tmp_path, first, steps):
    schedule = sf.constant(over=first) >> sf.constant(over=steps) * 1e38
    if first + steps < LONG:
        schedule = schedule >> sf.cosine(to=0.1)
    done = sf.fit(training(LONG, schedule=schedule), out=tmp_path / "run", operations=EAGER)
    assert done.status == "finished"
    (back,) = events(tmp_path / "run", "rolled_back")
    assert (back["detector"], back["step"]) == ("D5", 200)
    assert back["cause"] == "the learning rate jumped"
    assert sf.open_run(tmp_path / "run").log()["permitted"].all()


def test_an_early_stop_is_looked_at_too(tmp_path):
    """The damage makes the loss worse, so the run would end there."""
    stopping = sf.EarlyStopping(metric="loss", patience=1)
    done = {}
    for damage in (False, True):
        built = build(training(early_stopping=stopping), RunFolder(tmp_path / str(damage)), EAGER)
        built.run.alone, happened = False, False
        for outcome in run_steps(built):
            if damage and outcome.step == 57 and not happened:
                happened = True
                damaged(built.run, "weight", math.nan)
        done[damage] = result(built)
    assert done[True].status == done[False].status
    assert done[True].digest == done[False].digest


@contextmanager
def arriving(lag):
    """As on a device, rows arrive so many steps late."""
    begin = Readings.__init__
    with mock.patch.object(
        Readings, "__init__", lambda self, on: begin(self, on) or setattr(self, "lag", lag)
    ):
        yield


@functools.cache
def straight(make, lag, tmp):
    """A run that nothing disturbs, and the step of its first alarm."""
    with arriving(lag):
        done = sf.fit(make(), out=tmp / f"{make.__name__}-{lag}", operations=EAGER)
    seen = [e for e in sf.open_run(done.run_dir).events() if e["kind"] in ("rolled_back", "borne")]
    return done, seen, seen[0].get("at", seen[0]["step"] - 1)


@pytest.mark.parametrize("make", [jump, harder])
@pytest.mark.parametrize("lag", [0, 8])
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_what_waits_for_rows_does_not_make_an_alarm_come_earlier(tmp, tmp_path_factory, lag, make, data):
    """A checkpoint or a stop does."""
    done, seen, alarm = straight(make, lag, tmp)
    stops = data.draw(st.lists(st.integers(alarm - 3, alarm + 12), max_size=3), "stops")
    often = {"every": data.draw(st.sampled_from([2, 3, 5, 7, 1000]), "every")}
    operations = sf.Operations(compute={"compile": "off"}, progress="off", checkpoint=often)
    out = tmp_path_factory.mktemp("disturbed") / "run"
    with arriving(lag):
        for stop in stops:
            for outcome in sf.steps(make(), out=out, operations=operations):
                if outcome.step == stop:
                    break
        again = sf.fit(make(), out=out, operations=operations)
    assert (again.digest, again.ledger) == (done.digest, done.ledger)
    view = sf.open_run(out)
    told = [e for e in view.events() if e["kind"] in ("rolled_back", "borne")]
    for key in ("step", "at", "detector", "reason", "left", "ledger"):
        assert [e.get(key) for e in told] == [e.get(key) for e in seen]
    assert view.history().to_json() == sf.open_run(done.run_dir).history().to_json()
    assert view.verify() == []


def test_overflow_is_no_matter_of_data_where_an_alarm_is_put_off(tmp_path):
    straight = sf.fit(harder(), out=tmp_path / "run", operations=EAGER)
    (first, *_) = events(tmp_path / "run", "borne")
    built, happened = build(harder(), RunFolder(tmp_path / "damaged"), EAGER), False
    built.run.alone = False
    for outcome in run_steps(built):
        if outcome.step == first["step"] + 20 and not happened:
            happened = True
            weight = built.run.parts.model.weight
            built.run.state.optimizer.state[weight]["momentum_buffer"].view(-1)[5] = math.inf
    done = result(built)
    assert (done.status, done.digest) == ("finished", straight.digest)
    (back,) = events(tmp_path / "damaged", "rolled_back")
    assert back["detector"] == "D5"
