"""What the loop asks for between two steps: the time, and the next batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from surefoot.course import Course, Label
from surefoot.measure.profile import phase
from surefoot.stopping import NoLongerWaiting, StopRequest
from surefoot.types import Minibatch, Slots

AHEAD_S = 0.05
"""How long steps may follow one another, of which nobody is told, before an ordinary one."""


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
        self.ahead_until = self.boundary + (AHEAD_S if step_s < AHEAD_S else 0.0)


class Batches:
    """Batches, of which some may be fetched ahead, and given back."""

    def __init__(self, batches: Iterator[Minibatch]) -> None:
        self._rest = batches
        self._held: deque[Minibatch] = deque()
        self._trouble: Exception | None = None

    def __next__(self) -> Minibatch:
        if self._held:
            return self._held.popleft()
        if self._trouble is not None:
            raise self._trouble
        return next(self._rest)

    def ahead(self, num: int) -> list[Minibatch]:
        """The next ones, up to one that cannot be had: it fails when its turn comes."""
        found: list[Minibatch] = []
        try:
            while len(found) < num:
                found.append(next(self))
        except Exception as error:
            self._trouble = error
        return found

    def give_back(self, batches: Sequence[Minibatch]) -> None:
        """The next ones are these again."""
        self._held.extendleft(reversed(batches))


def next_batch(batches: Batches, stop: StopRequest, clock: Clock) -> Minibatch:
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
