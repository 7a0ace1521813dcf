"""Compiled steps that are certain to be calm, taken one after the other and settled together.

That saves most of what a small step costs beside its arithmetic. Rows, ledger and guard come out as if each
had been settled by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from surefoot.course import Course, Label, Taken, heeded, look_at_layers, settle_calm, to_be_taken
from surefoot.graph import Take
from surefoot.guard.review import Alarm
from surefoot.heal import EVERY
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

    The guard takes them up block by block, since what is certain follows from the block before. Only the
    last step of a block can raise an alarm, so an error within one loses none. They end where layers and
    weights are to be looked at.
    """
    graph, state, guard = course.graph, course.state, course.parts.guard
    assert graph is not None
    taken: list[Taken] = []
    batch, alarm = None, None
    direct, take = graph.direct(state.step)
    most = min(most, direct, EVERY - state.step % EVERY)
    try:
        while take is not None and batch is None and alarm is None and clock.boundary < clock.calm_until:
            num = min(most - len(taken), guard.calm_for(state.step))
            if num < 1:
                break
            block: list[Taken] = []
            try:
                batch = _take(course, batches, clock, take, num, block)
            finally:
                if block:
                    taken += block
                    losses, norms = ([one.numbers[i] for one in block] for i in range(2))
                    alarm = guard.take_calm(state.step - 1, losses, norms)
    finally:
        if taken:
            course.parts.updater.set_rates(taken[-1].multiplier, course.parts.base_lr)
            settle_calm(course, taken)
    alarm = heeded(course, alarm)
    if taken and alarm is None and guard.on and state.step % EVERY == 0:
        look_at_layers(course, graph.trained, taken[-1].norms)
        alarm = course.healer.look() if guard.heals else None
        clock.boundary = time.perf_counter()
    return len(taken), batch, alarm


def _take(
    course: Course, batches: Iterator[Minibatch], clock: Clock, take: Take, num: int, taken: list[Taken]
) -> Minibatch | None:
    """Takes `num` steps and adds them to `taken`, or fewer if time is up; or up to an unusual batch, which
    it returns.
    """
    state, bounds = course.state, course.parts.guard.lets_pass(course.state.step)
    for _ in range(num):
        if clock.boundary >= clock.calm_until:
            break
        asked = time.perf_counter()
        batch = next(batches)
        clock.waited_s = time.perf_counter() - asked
        without_holes, multiplier = to_be_taken(course, batch)
        done = take(without_holes, multiplier, bounds)
        if done is None:
            return batch
        state.step += 1
        state.samples += batch.slots.num_samples
        label = clock.label(course, batch.slots, multiplier, 1)
        taken.append(Taken(label, multiplier, *done, clock.boundary))
    return None
