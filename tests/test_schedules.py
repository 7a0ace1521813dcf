"""Schedules are pure functions of the update count, with the conventions that the module states."""

import math

import numpy as np
import pytest
from conftest import blobs, recipe
from hypothesis import given, settings
from hypothesis import strategies as st

import surefoot as sf
from surefoot.optim.schedules import resolve
from surefoot.types import duration


def measure(total):
    def updates(length, name):
        length = duration(length, name=name)
        if length.unit == "%":
            return round(length.value * total / 100)
        assert length.unit == "updates"
        return int(length.value)

    return updates


def table(schedule, total):
    return resolve(schedule, total, measure(total)).table()


C = [0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(5)]
TABLES = {
    "constant": (sf.constant(), 3, [1, 1, 1]),
    "warmup": (sf.warmup(4), 6, [0.25, 0.5, 0.75, 1, 1, 1]),
    "linear": (sf.linear(to=0.2), 5, [1, 0.8, 0.6, 0.4, 0.2]),
    "linear from": (sf.linear(start=0.5, to=1), 3, [0.5, 0.75, 1]),
    "cosine": (sf.cosine(), 5, C),
    "cosine to": (sf.cosine(to=0.1), 5, [0.1 + 0.9 * c for c in C]),
    "step": (sf.step(2, 0.5), 5, [1, 1, 0.5, 0.5, 0.25]),
    "exponential gamma": (sf.exponential(0.5), 4, [1, 0.5, 0.25, 0.125]),
    "exponential to": (sf.exponential(to=0.25), 3, [1, 0.5, 0.25]),
    "inverse sqrt": (
        sf.warmup(4) >> sf.inverse_sqrt(),
        8,
        [0.25, 0.5, 0.75, 1, 1, math.sqrt(4 / 5), math.sqrt(4 / 6), math.sqrt(4 / 7)],
    ),
    "inverse sqrt alone": (sf.inverse_sqrt(2), 3, [1, math.sqrt(2 / 3), math.sqrt(2 / 4)]),
    "one cycle": (
        sf.one_cycle(peak=0.5, start=0.2, to=0.0),
        5,
        [0.2, 1 - 0.8 * 0.5, 1, 0.5, 0],
    ),
    "restarts": (sf.restarts(3), 7, [1, 0.5, 0, 1, 0.5, 0, 1]),
    "growing restarts": (sf.restarts(2, growth=2), 7, [1, 0, 1, 0.75, 0.25, 0, 1]),
    "hold": (sf.constant(over=1) * 3 >> sf.hold(), 3, [3, 3, 3]),
    "first hold": (sf.hold(), 2, [1, 1]),
    "chain": (
        sf.constant(over=2) >> sf.constant(over=1) * 300.0 >> sf.cosine(to=0.0),
        8,
        [1, 1, 300, *C],
    ),
    "stable decay": (
        sf.warmup(2) >> sf.hold() >> sf.linear(over="50%"),
        10,
        [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0],
    ),
    "scaled chain": (2 * (sf.constant(over=1) * 3 >> sf.hold()), 3, [6, 6, 6]),
    "after the end": (sf.linear(over=3), 5, [1, 0.5, 0, 0, 0]),
    "one update": (sf.warmup("5%") >> sf.cosine(), 1, [1]),
}


@pytest.mark.parametrize("name", TABLES)
def test_table(name):
    schedule, total, expected = TABLES[name]
    np.testing.assert_allclose(table(schedule, total), expected, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TABLES)), st.integers(10, 400), st.data())
def test_they_are_pure_functions_of_the_update(name, total, data):
    resolved = resolve(TABLES[name][0], total, measure(total))
    whole = resolved.table()
    order = data.draw(st.permutations(range(0, total, max(1, total // 7))))
    assert [resolved(t) for t in order] == [whole[t] for t in order]
    assert all(v >= 0 and math.isfinite(v) for v in whole)
    assert resolved(total + 50) == whole[-1]


def test_torch_says_the_same_where_conventions_agree():
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=40, cycle_momentum=False)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = table(sf.one_cycle(peak=(0.3 * 40 - 1) / 39), 40)
    np.testing.assert_allclose(ours, rates, atol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "total", "says"),
    [
        (sf.warmup(50), 20, "its pieces last 50 updates, but the run has 20"),
        (sf.constant() >> sf.cosine(), 20, "2 pieces leave out over="),
        (sf.plateau() >> sf.plateau(), 9, "pieces leave out"),
    ],
)
def test_what_cannot_be_met_is_an_error(schedule, total, says):
    with pytest.raises(sf.RecipeError, match=says):
        table(schedule, total)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sf.exponential(),
        lambda: sf.exponential(0.5, 0.1),
        lambda: sf.exponential(-1),
        lambda: sf.one_cycle(peak=1.5),
        lambda: sf.restarts(3, growth=0),
        lambda: sf.plateau(factor=2),
    ],
)
def test_bad_arguments_are_errors(make):
    with pytest.raises(sf.RecipeError):
        make()


def falling(values):
    """A metric that says these values, one per validation."""
    left = iter(values)
    return lambda model, data: np_full(len(data[1]), next(left))


def np_full(n, value):
    import torch

    return torch.full((n,), value)


def validated(values, **changes):
    """A validation every 4 of 32 updates whose metric takes these values (the first: preflight)."""
    validation = sf.Validation(sf.Arrays(*blobs(16)), {"m": falling([0.0, *values])}, every=4)
    return recipe(validation=validation, until=32, **changes)


def test_plateau_cuts_the_rate_and_its_state_is_the_runs(tmp_path):
    values = [5.0, 4.0, 4.0, 4.0, 3.0, 3.5, 3.5, 3.5]
    schedule = sf.plateau("m", factor=0.1, patience=1)
    changed = validated(values, schedule=schedule)
    done = sf.fit(changed, out=tmp_path / "whole")
    log = sf.open_run(done.run_dir).log()
    np.testing.assert_allclose(log["lr"], [0.1] * 16 + [0.01] * 12 + [0.001] * 4)
    assert [e["step"] for e in sf.open_run(done.run_dir).events() if e["kind"] == "rate_cut"] == [16, 28]
    for outcome in sf.steps(validated(values, schedule=schedule), out=tmp_path / "parts"):
        if outcome.step == 13:
            break
    rest = sf.fit(validated(values[3:], schedule=schedule), out=tmp_path / "parts")
    assert rest.digest == done.digest


def test_early_stopping(tmp_path):
    stopping = sf.EarlyStopping("m", patience=3, mode="max")
    changed = validated([1.0, 2.0, 2.0, float("nan"), 1.0, 9.0], early_stopping=stopping)
    done = sf.fit(changed, out=tmp_path / "run")
    assert (done.status, done.step, done.exit_code) == ("stopped_early", 20, 0)
    again = sf.fit(changed, out=tmp_path / "run")
    assert (again.status, again.step, again.digest) == ("stopped_early", 20, done.digest)
