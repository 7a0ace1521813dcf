"""What benchmarks in turns count: the steps that were taken, however many at a time."""

import itertools
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import turns


def contender(clock, *, us, at_a_time):
    """Takes so many steps before it tells; None tells of one."""
    for done in itertools.count(1):
        clock[0] += 1e-6 * us * (at_a_time or 1)
        yield done * at_a_time if at_a_time else None


@pytest.mark.parametrize("at_a_time", [None, 1, 3, 10, 64, 200])
def test_a_turn_is_of_all_the_steps_that_are_taken_in_it(monkeypatch, at_a_time):
    clock = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])
    contenders = {
        "many": contender(clock, us=2.0, at_a_time=at_a_time),
        "one": contender(clock, us=5.0, at_a_time=None),
    }
    times = turns.in_turns(contenders, steps=20, turns=4)
    assert times == {"many": pytest.approx([2.0] * 4), "one": pytest.approx([5.0] * 4)}
    assert turns.ratio(times, "many", "one") == pytest.approx(0.4)


def test_a_contender_takes_at_least_as_many_steps():
    many = contender([0.0], us=1.0, at_a_time=7)
    assert [turns.advance(many, 0, 10), turns.advance(many, 14, 3), turns.advance(many, 21, 0)] == [
        14,
        21,
        21,
    ]
