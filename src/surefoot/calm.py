"""Compiled steps that are calm, taken one after the other and settled together.

That saves most of what a small step costs beside its arithmetic. Rows, ledger and guard come out as if each
had been settled by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from surefoot.course import Calm, Course, Label, settle_calm, to_be_taken
from surefoot.guard.review import Alarm
from surefoot.measure.profile import phase
from surefoot.stopping import NoLongerWaiting, StopRequest
from surefoot.types import Minibatch, Slots

_CALM_S = 0.05
"""How long calm steps may follow one another, their rows waiting, before an ordinary one."""
_TRUSTS_AGAIN = 2000
"""Steps after some that had to be undone."""


@dataclass(slots=True)
class Clock:
    """Seconds of a step and between rows. boundary: when the step began. waited_s: for its batch.
    calm_until: when the next ordinary step is due.
    """

    boundary: float = field(default_factory=time.perf_counter)
    row_before: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0
    calm_until: float = 0.0

    def label(self, course: Course, slots: Slots, multiplier: float, num_micro: int) -> Label:
        """What is known of the row of a step that has just ended; the next begins."""
        now = time.perf_counter()
        step_s, wall_s = now - self.boundary, now - self.row_before
        course.state.elapsed_s += step_s
        self.boundary = self.row_before = now
        lr = course.parts.base_lr[0] * multiplier
        return Label(slots, course.state.samples, lr, num_micro, self.waited_s, step_s, wall_s)

    def ordinary_step_ended(self) -> None:
        """Calm ones may follow."""
        self.calm_until = self.boundary + _CALM_S


def next_batch(batches: Iterator[Minibatch], stop: StopRequest, clock: Clock) -> Minibatch:
    """The next batch.

    Raises:
        NoLongerWaiting: a stop was asked for meanwhile.
    """
    asked = time.perf_counter()
    try:
        stop.waiting = True
        with phase("data"):
            return next(batches)
    except RuntimeError:
        if stop():  # a worker that the same signal ended
            raise NoLongerWaiting from None
        raise
    finally:
        stop.waiting = False
        clock.waited_s = time.perf_counter() - asked


class Stretch(NamedTuple):
    """Some calm steps. num: how many. batch: the one after them, if it turned out to be an unusual one.
    alarm: the guard's, if it has one. undone: steps after these were taken back: their batches are needed
    again.
    """

    num: int
    batch: Minibatch | None
    alarm: Alarm | None
    undone: bool


def calm_steps(course: Course, batches: Iterator[Minibatch], clock: Clock, *, most: int) -> Stretch:
    """Takes that many steps at most, while they are calm, and settles them together.

    The first of them are certain to be: until the guard takes up a block of numbers, its bounds are what
    they are. Those that follow are taken on trust, within narrower bounds, and looked at afterwards; if one
    was not within the bounds that it should have had, all are undone, and taken again block by block.
    """
    assert course.graph is not None
    state, guard, graph = course.state, course.parts.guard, course.graph
    num_direct, take = graph.direct(state.step)
    num_certain, bounds = guard.calm_for(state.step), guard.lets_pass(state.step)
    trusts = num_certain > 0 and state.step >= course.trusts_from
    most = min(most, num_direct) if trusts else min(most, num_direct, num_certain)
    taken: list[Calm] = []
    batch, alarm, num_settled = None, None, 0
    try:
        while take is not None and len(taken) < most and clock.boundary < clock.calm_until:
            if len(taken) == num_certain:
                graph.keep()
                bounds = guard.likely_to_pass()
            batch = next_batch(batches, course.stop, clock)
            without_holes, multiplier = to_be_taken(course, batch)
            with phase("compiled step"):
                numbers = take(without_holes, multiplier, bounds)
            if numbers is None:
                break
            state.step += 1
            state.samples += batch.slots.num_samples
            label = clock.label(course, batch.slots, multiplier, 1)
            taken.append(Calm(label, multiplier, numbers, time.time()))
            batch = None
    finally:
        if taken:
            num_settled, alarm = settle_calm(course, taken, num_certain)
            if num_settled < len(taken):
                _undo(course, taken[num_settled:])
            course.parts.updater.set_rates(taken[num_settled - 1].multiplier, course.parts.base_lr)
    undone = num_settled < len(taken)
    return Stretch(num_settled, None if undone else batch, alarm, undone)


def _undo(course: Course, taken: list[Calm]) -> None:
    """Takes back the newest steps."""
    assert course.graph is not None
    course.graph.go_back()
    course.trusts_from = course.state.step + _TRUSTS_AGAIN
    course.state.step -= len(taken)
    course.state.samples -= sum(one.label.slots.num_samples for one in taken)
