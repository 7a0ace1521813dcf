"""Compiled steps that are certain to be calm, taken one after the other and settled together.

That saves most of what a small step costs beside its arithmetic. Rows, ledger and guard come out as if each
had been settled by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from surefoot.course import Course, Label, settle_calm, to_be_taken
from surefoot.guard.review import Alarm
from surefoot.measure.profile import phase
from surefoot.stopping import NoLongerWaiting, StopRequest
from surefoot.types import Minibatch, Slots

_CALM_S = 0.05
"""How long calm steps may follow one another, their rows waiting, before an ordinary one."""


@dataclass(slots=True)
class Clock:
    """Seconds of an attempt, of a step and between rows. begun: when the attempt did. boundary: when the
    step did. waited_s: for its batch. calm_until: when the next ordinary step is due.
    """

    begun: float = field(default_factory=time.perf_counter)
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


def calm_steps(
    course: Course, batches: Iterator[Minibatch], clock: Clock, *, most: int
) -> tuple[int, Minibatch | None, Alarm | None]:
    """Takes that many steps at most, while they are certain to be calm, and settles them together. How many
    it took; the batch after them, if it turned out to be an unusual one; the guard's alarm, if it has one.
    """
    assert course.graph is not None
    state, guard = course.state, course.parts.guard
    direct, take = course.graph.direct(state.step, guard.lets_pass(state.step))
    most = min(most, direct, guard.calm_for(state.step))
    taken: list[tuple[Label, list[float], float]] = []
    batch, alarm, multiplier = None, None, 0.0
    try:
        while take is not None and len(taken) < most and clock.boundary < clock.calm_until:
            batch = next_batch(batches, course.stop, clock)
            without_holes, multiplier = to_be_taken(course, batch)
            with phase("compiled step"):
                numbers = take(without_holes, multiplier)
            if numbers is None:
                break
            state.step += 1
            state.samples += batch.slots.num_samples
            taken.append((clock.label(course, batch.slots, multiplier, 1), numbers, time.time()))
            batch = None
    finally:
        if taken:
            course.parts.updater.set_rates(multiplier, course.parts.base_lr)
            alarm = settle_calm(course, taken)
    return len(taken), batch, alarm
