"""Steps after which nothing is due, taken one after the other and settled together.

That saves most of what a small step costs beside its arithmetic: what runs only now and then finds cold
caches. Rows, ledger and guard come out as if each step had been settled by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from surefoot.course import (
    Course,
    Label,
    Taken,
    heeded,
    look_at_layers,
    multipliers,
    settle_calm,
    update,
    without_quarantined,
)
from surefoot.graph import Graph, Take
from surefoot.guard.detect import BLOCK, FINE
from surefoot.guard.review import Alarm
from surefoot.heal import EVERY
from surefoot.measure.profile import phase
from surefoot.measure.readings import floats
from surefoot.stopping import NoLongerWaiting, StopRequest
from surefoot.train_step import Attempt
from surefoot.types import Minibatch, Slots

_AHEAD_S = 0.05
"""How long steps may follow one another, their rows waiting, before an ordinary one."""


class Ahead(NamedTuple):
    """What `steps_ahead` did. num: steps that it took and settled. batch: of the next step, if it was
    fetched already. attempted: the next step, if that was taken already, but not settled: what `update`
    returned. alarm: of the guard.
    """

    num: int = 0
    batch: Minibatch | None = None
    attempted: tuple[Minibatch, float, Attempt] | None = None
    alarm: Alarm | None = None


NOTHING = Ahead()


@dataclass(slots=True)
class Clock:
    """Seconds of an attempt, of a step and between rows. begun: when the attempt did. boundary: when the
    step did. waited_s: for its batch. ahead_until: until when others may follow the last ordinary step.
    """

    begun: float = field(default_factory=time.perf_counter)
    boundary: float = field(default_factory=time.perf_counter)
    row_before: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0
    ahead_until: float = 0.0

    def label(self, course: Course, slots: Slots, multiplier: float, num_micro: int) -> Label:
        """What is known of the row of a step that has just ended; the next begins."""
        now = time.perf_counter()
        step_s, wall_s = now - self.boundary, now - self.row_before
        course.state.elapsed_s += step_s
        self.boundary = self.row_before = now
        lr = course.parts.base_lr[0] * multiplier
        return Label(slots, course.state.samples, lr, num_micro, self.waited_s, step_s, wall_s)

    def ordinary_step_ended(self, step_s: float) -> None:
        """Others may follow, unless steps take so long that their rows are waited for."""
        self.ahead_until = self.boundary + (_AHEAD_S if step_s < _AHEAD_S else 0.0)


def next_batch(batches: Iterator[Minibatch], stop: StopRequest, clock: Clock) -> Minibatch:
    """The next batch.

    Raises:
        NoLongerWaiting: a stop was asked for meanwhile.
    """
    asked = time.perf_counter()
    try:
        stop.waiting = True
        if stop.reason:  # of a signal that came after the last look, and before it could end the wait
            raise NoLongerWaiting
        with phase("data"):
            return next(batches)
    except RuntimeError:
        if stop():  # a worker that the same signal ended
            raise NoLongerWaiting from None
        raise
    finally:
        stop.waiting = False
        clock.waited_s = time.perf_counter() - asked


def steps_ahead(course: Course, batches: Iterator[Minibatch], clock: Clock, *, most: int) -> Ahead:
    """Takes that many steps at most, after none of which anything is due, and settles them together."""
    graph = course.graph if course.state.eager_from is None else None
    if not isinstance(graph, Graph) or not graph.is_whole:
        return _one_by_one(course, batches, clock, most)
    num, take = graph.direct(course.state.step)
    if take is None:  # until an ordinary step has gone through torch
        return NOTHING
    return _calm_steps(course, batches, clock, take, min(most, num))


def _one_by_one(course: Course, batches: Iterator[Minibatch], clock: Clock, most: int) -> Ahead:
    """Takes steps, up to the first that is not simply fine. Only the last of a block can raise an alarm."""
    state, guard, now, begun = course.state, course.parts.guard, time.perf_counter, clock.boundary
    num, alarm = min(most, EVERY - 1 - state.step % EVERY, guard.fine_for(state.step), BLOCK), None
    taken: list[Taken] = []
    try:
        for multiplier in multipliers(course, num):
            if clock.boundary >= clock.ahead_until:
                break
            asked = now()
            batch = next(batches)
            clock.waited_s = now() - asked
            batch, _, attempt = attempted = update(course, batch, multiplier)
            if attempt.verdict != FINE or not attempt.permitted:
                return Ahead(len(taken), attempted=attempted)
            clock.boundary = ended = now()
            known = batch.slots, state.samples, multiplier, attempt.num_micro, clock.waited_s
            taken.append(Taken(*known, floats(attempt.numbers()), attempt.norms, ended))
    finally:
        if taken:
            alarm = guard.review_calm(taken[-1].slots.step, [one.numbers[0] for one in taken])
            settle_calm(course, taken, begun=begun, row_before=clock.row_before)
            clock.row_before = clock.boundary
    return Ahead(len(taken), alarm=heeded(course, alarm))


def _calm_steps(course: Course, batches: Iterator[Minibatch], clock: Clock, take: Take, most: int) -> Ahead:
    """Takes compiled steps that are certain to be calm, up to an unusual batch.

    The guard takes them up block by block, since what is certain follows from the block before. Only the
    last step of a block can raise an alarm, so an error within one loses none. They end where layers are to
    be looked at. The weights need no look: no graph applies an update after which they are not finite.
    """
    graph, state, guard = course.graph, course.state, course.parts.guard
    assert isinstance(graph, Graph)
    taken: list[Taken] = []
    batch, alarm, begun = None, None, clock.boundary
    most = min(most, EVERY - state.step % EVERY)
    try:
        while batch is None and alarm is None and clock.boundary < clock.ahead_until:
            num = min(most - len(taken), guard.calm_for(state.step), BLOCK)
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
            settle_calm(course, taken, begun=begun, row_before=clock.row_before)
            clock.row_before = clock.boundary
    alarm = heeded(course, alarm)
    if taken and alarm is None and guard.on and state.step % EVERY == 0:
        look_at_layers(course, graph.layers, taken[-1].norms)
        clock.boundary = time.perf_counter()
    return Ahead(len(taken), batch, alarm=alarm)


def _take(
    course: Course, batches: Iterator[Minibatch], clock: Clock, take: Take, num: int, taken: list[Taken]
) -> Minibatch | None:
    """Takes `num` steps and adds them to `taken`, or fewer if time is up; or up to an unusual batch, which
    it returns. What can be done for all of them at once is not done here: between two steps' kernels
    nothing of it is in a cache.
    """
    state, now, until = course.state, time.perf_counter, clock.ahead_until
    bounds, has_holes = course.parts.guard.lets_pass(state.step), course.parts.guard.history.has_holes
    for multiplier in multipliers(course, num):
        if clock.boundary >= until:
            break
        asked = now()
        batch = next(batches)
        waited_s = now() - asked
        done = take(without_quarantined(course, batch) if has_holes else batch, multiplier, bounds)
        if done is None:
            clock.waited_s = waited_s
            return batch
        state.step += 1
        state.samples += batch.slots.num_samples
        clock.boundary = ended = now()
        taken.append(Taken(batch.slots, state.samples, multiplier, 1, waited_s, *done, ended))
    return None
