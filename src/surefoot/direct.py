"""Steps of a graph that need no look at anything but what comes out, taken in laps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from surefoot.laps import ALL_TAKEN, FAILED, NOT_APPLIED, OUT_OF_TIME, Done, Laps
from surefoot.types import Minibatch

Bounds = tuple[float, float, float]
"""See `Watch.lets_pass`."""


class Direct:
    """Steps of a graph, each within bounds: one beyond ends its lap, and changes nothing.

    Args:
        again: the last call of the graph for other tensors.
        laps: the same, several times in a row; None if that is not possible.
        tensors_of: those of a batch that differ from step to step; None if the batch is unlike others.
        setting_of: numbers that depend on bounds and the rates' multiplier; `write` writes them down.
        seed: seeds the random numbers of a step, if it draws any.
    """

    def __init__(
        self,
        again: Callable[[Sequence[Any]], Sequence[Any]],
        laps: Laps | None,
        *,
        tensors_of: Callable[[Minibatch], list[Any] | None],
        setting_of: Callable[[Bounds, float], list[float]],
        write: Callable[[list[float]], None],
        seed: Callable[[int], None] | None,
    ) -> None:
        self._again, self._laps, self._seed = again, None if seed else laps, seed
        self._tensors_of, self._setting_of, self._write = tensors_of, setting_of, write

    @property
    def goes_on_meanwhile(self) -> bool:
        """Whether a lap may be begun while another is under way."""
        return self._laps is not None and self._laps.goes_on_meanwhile

    def begin(
        self, batches: Sequence[Minibatch], multipliers: Sequence[float], bounds: Bounds, until: float
    ) -> tuple[int, Callable[[], Done]]:
        """Has a step taken with each batch, up to the first that is unlike others; how many there are, and
        what waits for the lap to end.

        until: by `time.perf_counter`: a step that ends then, or later, is the last.
        """
        tensors: list[list[Any]] = []
        for batch in batches:
            own = self._tensors_of(batch)
            if own is None:
                break
            tensors.append(own)
        settings = [self._setting_of(bounds, m) for m in multipliers[: len(tensors)]]
        if self._laps is not None and tensors:
            lap = self._laps.begin(tensors, np.array(settings), until)
            return len(tensors), partial(self._laps.wait, lap)
        done = self._one_by_one([batch.slots.step for batch in batches], tensors, settings, until)
        return len(tensors), lambda: done

    def _one_by_one(
        self, steps: list[int], tensors: list[list[Any]], settings: list[list[float]], until: float
    ) -> Done:
        rows: list[list[float]] = []
        begun = ended = time.perf_counter()
        last = None
        try:
            for step, own, setting in zip(steps, tensors, settings, strict=False):
                if ended >= until:
                    return Done(rows, begun, last, OUT_OF_TIME)
                self._write(setting)
                if self._seed is not None:
                    self._seed(step)
                row, other = self._again(own)
                numbers: list[float] = row.tolist()
                ended = time.perf_counter()
                if not numbers[-1]:
                    return Done(rows, begun, last, NOT_APPLIED)
                rows.append([*numbers, ended])
                last = other
        except Exception as error:
            return Done(rows, begun, last, FAILED, error)
        return Done(rows, begun, last, ALL_TAKEN)
