"""Contenders that go on in one process, in turns: neighbours share the machine's speed of the moment."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def in_turns(contenders: Mapping[str, Iterator[Any]], *, steps: int, turns: int) -> dict[str, list[float]]:
    """Microseconds per step of each contender in each turn, after one turn that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            begun = time.perf_counter()
            for _ in range(steps):
                next(contenders[name])
            if turn:
                times[name].append(1e6 * (time.perf_counter() - begun) / steps)
    for contender in contenders.values():
        if hasattr(contender, "close"):
            contender.close()
    return times


def by_update(outcomes: Iterator[Any]) -> Iterator[None]:
    """An item per update of a run, of which some are taken between two outcomes."""
    done = 0
    for outcome in outcomes:
        for _ in range(done, outcome.step + 1):
            yield
        done = outcome.step + 1


class Window:
    """Times some updates: from the first moment at which `warm` are done to the first at which `timed` more
    are. Those of a run may be several at a time, so that it begins and ends where they are told of.
    """

    def __init__(self, warm: int, timed: int) -> None:
        self._warm, self._timed = warm, timed
        self._first, self._begun = 0, 0.0
        self.done, self.us = 0, 0.0

    def tick(self, done: int | None = None) -> bool:
        """Whether that is all; us: microseconds per update then. done: so many are, if not one more."""
        self.done = self.done + 1 if done is None else done
        if not self._first:
            if self.done >= self._warm:
                self._first, self._begun = self.done, time.perf_counter()
        elif self.done >= self._first + self._timed:
            self.us = 1e6 * (time.perf_counter() - self._begun) / (self.done - self._first)
        return self.us > 0


def ratio(times: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Median of the ratios of neighbouring turns."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def in_process(script: str, *arguments: str) -> Any:
    """What a call of `script` prints on its last line, as JSON: memory lies otherwise in each process,
    which makes a difference of some percent to small steps.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
