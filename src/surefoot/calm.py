"""Steps after which nothing is due, taken one after the other and settled together.

That saves most of what a small step costs beside its arithmetic: what runs only now and then finds cold
caches. Rows, ledger and guard come out as if each step had been settled by itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from surefoot.clock import Batches, Clock
from surefoot.course import (
    Course,
    Taken,
    heeded,
    look_at_layers,
    multipliers,
    settle_calm,
    update,
    without_quarantined,
)
from surefoot.direct import Direct
from surefoot.draws import draws_nothing
from surefoot.graph import Graph
from surefoot.guard.detect import BLOCK, FINE, LAG
from surefoot.guard.review import Alarm
from surefoot.heal import EVERY
from surefoot.laps import ALL_TAKEN, NOT_APPLIED, Done
from surefoot.measure.readings import floats
from surefoot.optim.gradients import ClipNorm, ClipValue
from surefoot.train_step import Attempt
from surefoot.types import Minibatch

LAP = 16
"""Most steps of a lap, where the next may be begun meanwhile."""


class Ahead(NamedTuple):
    """What `steps_ahead` did. num: steps that it took and settled. unusual: the next, which a graph did not
    take, has to be an ordinary one. attempted: the next, if it was taken eagerly, but not settled: what
    `update` returned. alarm: of the guard.
    """

    num: int = 0
    unusual: bool = False
    attempted: tuple[Minibatch, float, Attempt] | None = None
    alarm: Alarm | None = None


NOTHING = Ahead()


def steps_ahead(course: Course, batches: Batches, clock: Clock, *, most: int) -> Ahead:
    """Takes that many steps at most, after none of which anything is due, and settles them together."""
    graph = course.graph if course.state.eager_from is None else None
    if not isinstance(graph, Graph) or not graph.is_whole:
        return _one_by_one(course, batches, clock, most)
    num, direct = graph.direct(course.state.step)
    if direct is None:  # until an ordinary step has gone through torch
        return NOTHING
    return _Stretch(course, batches, clock, direct, min(most, num)).take()


def _one_by_one(course: Course, batches: Batches, clock: Clock, most: int) -> Ahead:
    """Takes steps, up to the first that is not simply fine. Only the last of a block can raise an alarm."""
    state, guard, now, begun = course.state, course.parts.guard, time.perf_counter, clock.boundary
    num, alarm = min(most, EVERY - 1 - state.step % EVERY, guard.fine_for(state.step), BLOCK), None
    taken: list[Taken] = []
    if course.draws_nothing is None:
        course.draws_nothing = _draws_nothing(course)
    course.parts.generators.rest = course.draws_nothing
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
            taken.append(Taken(*known, floats(attempt.numbers()), ended))
    finally:
        course.parts.generators.rest = False
        if taken:
            alarm = guard.review_calm(taken[-1].slots.step, [one.numbers[0] for one in taken])
            settle_calm(course, taken, begun=begun, row_before=clock.row_before)
            clock.row_before = clock.boundary
    return Ahead(len(taken), alarm=heeded(course, alarm))


def _draws_nothing(course: Course) -> bool:
    """Whether no step draws random numbers, or has code of the caller's in it, which may look at them."""
    parts, own = course.parts, {ClipNorm, ClipValue}
    if not {type(transform) for transform in parts.transforms} <= own or not parts.updater.is_torchs():
        return False
    return draws_nothing(parts.model, parts.objective, course.feed.source)


class _Lap(NamedTuple):
    """A lap that was begun. waited_s: for its batches, and for all else that it needs. wait: until it has
    ended.
    """

    batches: Sequence[Minibatch]
    multipliers: Sequence[float]
    waited_s: float
    wait: Callable[[], Done]


class _Stretch:
    """Compiled steps that are certain to be calm, taken in laps, up to an unusual one.

    While laps are under way the rows of those before are written, and the next is begun. The guard takes
    them up lap by lap: only the last step of one can raise an alarm, and none is begun after one that may.
    The weights need no look: no graph applies an update after which they are not finite.

    Args:
        most: steps.
    """

    def __init__(self, course: Course, batches: Batches, clock: Clock, direct: Direct, most: int) -> None:
        self._course, self._batches, self._clock, self._direct = course, batches, clock, direct
        self._left, self._num = most, 0  # to be begun; taken
        self._under_way: deque[_Lap] = deque()
        self._taken: list[Taken] = []  # to be settled
        self._settled_until = clock.boundary
        self._multiplier = 1.0
        self._ends = self._unusual = False
        self._alarm: Alarm | None = None

    def take(self) -> Ahead:
        """Takes and settles them."""
        try:
            while self._begin_laps():
                self._settle()  # while they are under way
                self._end_lap()
        except Exception:  # what is under way counts
            while self._under_way:
                self._end_lap()
            raise
        finally:
            for lap in self._under_way:  # after an interruption: it may have come amid counting
                lap.wait()
            self._settle()
            if self._num:
                self._course.parts.updater.set_rates(self._multiplier, self._course.parts.base_lr)
        return Ahead(self._num, self._unusual, alarm=self._alarm)

    def _begin_laps(self) -> bool:
        """Begins as many as may be under way; whether there are any."""
        most_before = LAG if self._direct.goes_on_meanwhile else 0
        while not self._ends:
            before = sum(len(lap.batches) for lap in self._under_way)
            if before > most_before or not self._begin_lap(before):
                break
        return len(self._under_way) > 0

    def _begin_lap(self, before: int) -> bool:
        """Begins one after the steps that are under way; whether it could."""
        course, asked = self._course, time.perf_counter()
        state, guard = course.state, course.parts.guard
        if asked >= self._clock.ahead_until or course.stop.reason:
            return False
        calm, bounds = guard.calm_after(before, state.step)
        until_layers = EVERY - (state.step + before) % EVERY
        num = min(self._left, calm, until_layers, LAP if self._direct.goes_on_meanwhile else BLOCK)
        if num < 1:
            return False
        rates = multipliers(course, num, after=before)
        batches = given = self._batches.ahead(len(rates))
        waited_s = time.perf_counter() - asked
        if guard.history.has_holes:
            given = [without_quarantined(course, batch) for batch in batches]
        begun, wait = self._direct.begin(given, rates, bounds, self._clock.ahead_until)
        self._batches.give_back(batches[begun:])
        self._left -= begun
        self._ends, self._unusual = begun < num, begun < len(batches)
        if begun:
            self._under_way.append(_Lap(batches[:begun], rates, waited_s, wait))
        return begun > 0

    def _end_lap(self) -> None:
        """Waits for the first that is under way; the guard takes its steps up."""
        done = self._under_way[0].wait()
        lap, num = self._under_way.popleft(), len(done.rows)
        if num:
            self._take_up(lap, done.rows, max(0.0, min(lap.waited_s, done.begun - self._clock.boundary)))
            if self._alarm is None and self._course.parts.guard.on and self._course.state.step % EVERY == 0:
                self._look_at_layers(done.last)
        if done.ending != ALL_TAKEN:
            self._ends, self._unusual = True, done.ending == NOT_APPLIED
            later = [batch for one in self._under_way for batch in one.batches]
            while self._under_way:  # none of whose steps were taken
                self._under_way[0].wait()
                self._under_way.popleft()
            self._batches.give_back([*lap.batches[num:], *later])
        if done.error is not None:
            raise done.error

    def _look_at_layers(self, norms: Tensor | None) -> None:
        assert isinstance(self._course.graph, Graph)
        assert norms is not None
        look_at_layers(self._course, self._course.graph.layers, norms)

    def _take_up(self, lap: _Lap, rows: Sequence[Sequence[float]], waited_s: float) -> None:
        """Counts steps, and has the guard take them up. waited_s: by the first of them, for its batch."""
        course, state = self._course, self._course.state
        for batch, multiplier, (*numbers, ended) in zip(lap.batches, lap.multipliers, rows, strict=False):
            state.samples += batch.slots.num_samples
            self._taken.append(Taken(batch.slots, state.samples, multiplier, 1, waited_s, numbers, ended))
            waited_s = 0.0
        state.step, self._num = state.step + len(rows), self._num + len(rows)
        self._multiplier, self._clock.boundary = self._taken[-1].multiplier, self._taken[-1].ended
        losses, norms = ([row[i] for row in rows] for i in range(2))
        alarm = course.parts.guard.take_calm(state.step - 1, losses, norms)
        self._ends |= alarm is not None
        self._alarm = heeded(course, alarm)

    def _settle(self) -> None:
        """Writes the rows of steps that the guard has taken up."""
        taken, self._taken = self._taken, []
        if taken:
            clock = self._clock
            settle_calm(self._course, taken, begun=self._settled_until, row_before=clock.row_before)
            clock.row_before = self._settled_until = taken[-1].ended
