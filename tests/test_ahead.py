"""Eager steps that are settled together: everything comes out as if each had been settled by itself."""

import math
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, mlp, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graph import EVENTFUL, calmly, diverging, run

import surefoot as sf
from surefoot import calm, clock, train
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.data.plan import Plan
from surefoot.heal import SELDOM
from surefoot.measure.readings import Readings
from surefoot.operations import Operations
from surefoot.optim.schedules import Piece
from surefoot.record.folder import RunFolder


def eager(**more):
    return Operations(compute={"compile": "off"}, progress="off", **more)


EAGER = eager()
NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.fixture
def together(monkeypatch):
    """The steps that were settled together."""
    settle, steps = calm.settle_calm, []

    def told(run, taken, **times):
        steps.extend(one.slots.step for one in taken)
        settle(run, taken, **times)

    monkeypatch.setattr(calm, "settle_calm", told)
    return steps


def both(changed, tmp_path, monkeypatch, **operations):
    """What a run tells that settles steps together, and what one that does not."""
    return [
        calmly(changed(), tmp_path / str(ahead), monkeypatch, calm=ahead, compile="off", **operations)
        for ahead in (True, False)
    ]


def alike(found):
    for a, b in zip(*found, strict=True):
        np.testing.assert_equal(a, b)  # NaN is NaN


def test_nearly_all_steps_are_settled_together(tmp_path, together, monkeypatch):
    monkeypatch.setattr(clock, "AHEAD_S", 60.0)  # however slow the machine is
    changed = recipe(until=1000)
    ordinary = [o.step for o in run_steps(build(changed, RunFolder(tmp_path / "run"), EAGER))]
    assert sorted(ordinary + together) == list(range(1000))
    assert {0, 199, 399, 599, 799, 999} <= set(ordinary)
    assert len(together) > 800
    assert sf.open_run(tmp_path / "run").log()["step"].tolist() == list(range(1000))


def test_layers_are_looked_at_however_seldom_states_are_kept(tmp_path, monkeypatch, together):
    """As in a compiled run whose steps are of several passes."""
    monkeypatch.setattr(train.Run, "remembers_every", SELDOM)
    run(recipe(until=1000), tmp_path / "run", EAGER)
    assert not {199, 399, 599, 799} & set(together)


@pytest.mark.parametrize("name", EVENTFUL)
def test_they_come_out_as_one_by_one(name, tmp_path, monkeypatch, together):
    def changed():
        return diverging() if name == "healed" else recipe(**EVENTFUL[name])

    found = both(changed, tmp_path, monkeypatch, checkpoint={"every": 61})
    alike(found)
    assert together
    assert ("layer" in {e["kind"] for e in found[0][2]}) == (name == "vanishing")


@settings(max_examples=15)
@given(
    bad=st.dictionaries(st.integers(0, 199), st.sampled_from([*NOT_FINITE, 1e4, -300.0]), max_size=12),
    rate=st.sampled_from([0.01, 0.3, 3.0, 30.0]),
    batch=st.sampled_from([1, 7, 20]),
    mode=st.sampled_from(["heal", "watch", "off"]),
    until=st.integers(1, 330),
    most=st.sampled_from([1, 2, 50]),
)
def test_whatever_the_samples_are(tmp_path_factory, bad, rate, batch, mode, until, most):
    x, y = blobs(200)
    for i, value in bad.items():
        x[i, i % 8] = value

    def changed():
        return recipe(
            data=sf.Arrays(x, y),
            batch=sf.Batch(batch),
            optimizer=sf.SGD(lr=rate),
            guard=sf.Guard(mode, max_refused_in_a_row=most),
            until=until,
        )

    with pytest.MonkeyPatch.context() as patch:
        alike(both(changed, tmp_path_factory.mktemp("runs"), patch))


def test_a_run_that_is_interrupted_between_them_ends_with_the_same_bits(tmp_path):
    changed = recipe(**EVENTFUL["dropout"])
    for at in (1, 2, 3, 31, 32, 33, 64, 150, 199, 200, 201, 333, 699):
        parts, _ = run(changed, tmp_path / "parts", eager(budget={"updates": at}))
        assert (parts.status, parts.step) == ("budget", at)
    parts, _ = run(changed, tmp_path / "parts", EAGER)
    whole, _ = run(changed, tmp_path / "whole", EAGER)
    assert (parts.status, parts.digest, parts.ledger) == ("finished", whole.digest, whole.ledger)


class Failing(torch.nn.Sequential):
    """Fails in its hundred and first forward pass."""

    def __init__(self):
        super().__init__(*mlp())
        self.left = 100

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError
        return super().forward(x)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_loses_no_row(tmp_path, together, error, monkeypatch):
    monkeypatch.setattr(clock, "AHEAD_S", 60.0)  # however slow the machine is

    class Model(Failing):
        def forward(self, x):
            try:
                return super().forward(x)
            except ZeroDivisionError:
                raise error from None

    built = build(recipe(model=Model, until=300, guard=sf.Guard("off")), RunFolder(tmp_path / "run"), EAGER)
    done = []
    with pytest.raises(error):
        done += [o.step for o in run_steps(built)]
    assert sf.open_run(tmp_path / "run").log()["step"].tolist() == list(range(100))
    assert together[-1] == 99
    assert max(done, default=0) < 99


@pytest.mark.parametrize("mode", ["heal", "off"])
@pytest.mark.parametrize("compile", ["on", "off"])
def test_a_schedule_that_fails_loses_no_step(tmp_path, mode, compile):
    """It is asked for some steps ahead."""

    @dataclass(frozen=True)
    class Failing(Piece):
        def curve(self, n, measure, *, start, before):
            return lambda t: 1.0 if t != 100 else 1 / 0

    changed = recipe(schedule=Failing(), guard=sf.Guard(mode), until=700)
    operations = Operations(compute={"compile": compile}, progress="off")
    with pytest.raises(ZeroDivisionError):
        run(changed, tmp_path / "run", operations)
    assert sf.open_run(tmp_path / "run").log()["step"].tolist() == list(range(100))


def test_the_body_of_a_loop_runs_after_every_step(tmp_path, together):
    steps = [o.step for o in sf.steps(recipe(until=150), out=tmp_path / "run", operations=EAGER)]
    assert (steps, together) == (list(range(150)), [])


def test_rows_of_slow_steps_do_not_wait(tmp_path, together):
    def objective(model, data):
        time.sleep(0.06)
        return F.cross_entropy(model(data[0]), data[1], reduction="none")

    run(recipe(objective=objective, until=12), tmp_path / "run", EAGER)
    assert together == []


def test_a_stop_is_heeded_after_them(tmp_path, monkeypatch):
    settle, last = calm.settle_calm, []

    def asked(course, taken, **times):
        course.stop.reason = "SIGTERM"
        last.append(taken[-1].slots.step)
        settle(course, taken, **times)

    monkeypatch.setattr(calm, "settle_calm", asked)
    done, _ = run(recipe(until=700), tmp_path / "run", EAGER)
    assert (done.status, done.reason) == ("preempted", "SIGTERM")
    assert last[-1] == done.step - 1


def test_a_row_has_the_time_of_its_step(tmp_path):
    run(recipe(until=400), tmp_path / "run", EAGER)
    log = sf.open_run(tmp_path / "run").log()
    between, wall_s = np.diff(log["time_s"]), log["wall_s"][1:]
    assert (between >= 0).all()
    assert np.median(np.abs(between - wall_s)) < 0.5 * np.median(wall_s)
    assert wall_s.sum() < 1.2 * between.sum()  # no time is counted twice


@pytest.mark.parametrize("rules", [{"max_refused_in_a_row": 3}, {}])
def test_numbers_that_arrive_later_are_waited_for_by_the_guard(tmp_path, monkeypatch, rules, together):
    """As on a GPU, where the row of a step is known eight steps later."""
    begin = Readings.__init__
    monkeypatch.setattr(Readings, "__init__", lambda self, on: begin(self, on) or setattr(self, "lag", 8))
    x, y = blobs(3000)
    for step in range(101, 105):
        x[Plan(3000, 20, seed=0).ids(step)] = 1e38

    def changed():
        data = sf.Arrays(x, y)
        return recipe(data=data, batch=sf.Batch(20), guard=sf.Guard(**rules), until=300)

    found = both(changed, tmp_path, monkeypatch)
    alike(found)
    assert together == []
    assert found[0][2]  # the guard does something


class Averaging:
    """Keeps the norm that it was given, and changes it one step later."""

    def __init__(self):
        self.last = torch.tensor(0.0)

    def __call__(self, grads, norm):
        self.last.add_(norm).mul_(0.5)
        self.last = norm


def test_a_transform_that_changes_its_norm_later_changes_no_row(tmp_path, monkeypatch):
    alike(both(lambda: recipe(gradient=(Averaging(),), until=300), tmp_path, monkeypatch))
