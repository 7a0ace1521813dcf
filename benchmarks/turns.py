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
    """Microseconds per step of each contender in each turn, after one turn that is not timed. A contender
    that takes several steps at a time says, by numbers, how many are done; its turn is that much longer.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    done = dict.fromkeys(contenders, 0)
    for turn in range(turns + 1):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            first, begun = done[name], time.perf_counter()
            done[name] = advance(contenders[name], first, steps)
            if turn:
                times[name].append(1e6 * (time.perf_counter() - begun) / (done[name] - first))
    for contender in contenders.values():
        if hasattr(contender, "close"):
            contender.close()
    return times


def advance(contender: Iterator[Any], done: int, steps: int) -> int:
    """Has a contender take `steps` more, or somewhat more; how many are done then."""
    until = done + steps
    while done < until:
        told = next(contender)
        done = told if isinstance(told, int) else done + 1
    return done


def num_done(outcomes: Iterator[Any]) -> Iterator[int]:
    """How many updates of a run are done, whenever it tells: some are taken between two outcomes."""
    return (outcome.step + 1 for outcome in outcomes)


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
