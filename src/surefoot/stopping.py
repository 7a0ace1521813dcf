"""What stops a run at a step boundary: signals, and budgets."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class NoLongerWaiting(BaseException):
    """Raised by a signal out of the wait for a batch, where the state is whole."""


@dataclass
class StopRequest:
    """Whether somebody asked for a stop at the next step boundary, and who. waiting: the loop waits for
    a batch, which may take long and changes nothing, so that a signal may end the wait. budget: which
    one is reached. num_asked: how often the loop has looked, which shows that it moves. give_up: ends the
    process; called if it lives on for `grace_s` after SIGTERM.
    """

    reason: str = ""
    waiting: bool = False
    budget: str = ""
    num_asked: int = 0
    grace_s: float = 300.0
    give_up: Callable[[], None] | None = None

    def __call__(self) -> bool:
        """Whether."""
        self.num_asked += 1
        return bool(self.reason)


@dataclass(frozen=True)
class Budget:
    """Limits of a whole run, all its attempts together; None: no limit.

    spent_s, spent: wall time and money of the attempts before this one.
    """

    seconds: float | None = None
    updates: int | None = None
    cost: float | None = None
    spent_s: float = 0.0
    spent: float = 0.0

    def reached(self, updates: int, *, wall_s: float, cost: float) -> str:
        """Which limit is reached, given this attempt's wall time and cost; ``""`` if none is."""
        if self.updates is not None and updates >= self.updates:
            return f"budget.updates = {self.updates:,} is reached"
        if self.seconds is not None and self.spent_s + wall_s >= self.seconds:
            return f"budget.time = {self.seconds:,.0f} s is reached"
        if self.cost is not None and self.spent + cost >= self.cost:
            return f"budget.cost = {self.cost:g} is reached"
        return ""


@contextmanager
def signals_ask(stop: StopRequest) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a stop at the next step boundary; a second SIGINT interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    timers: list[threading.Timer] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop():
            raise KeyboardInterrupt
        stop.reason = signal.Signals(number).name
        if number == signal.SIGTERM and stop.give_up is not None and not timers:
            timers.append(threading.Timer(stop.grace_s, stop.give_up))
            timers[0].daemon = True
            timers[0].start()
        if stop.waiting:
            raise NoLongerWaiting

    try:
        with handling(ask):
            yield
    finally:
        for timer in timers:
            timer.cancel()


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` meanwhile. For the main thread."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
