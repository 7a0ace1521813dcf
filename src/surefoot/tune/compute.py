"""Which way to compute is fastest here: measured on a recipe's own batches, each alternative in turns.

What is measured are updates as a run takes them, without a run directory. Layout, threads, compilation and
workers are tried one after another, each beside the best so far: a few minutes do, where all combinations
would take an hour. All begin at what torch does by itself, whatever an earlier measurement found.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from surefoot.choice import Extent
from surefoot.course import Course, Silence, callers_generators, first_failure, update
from surefoot.data.feed import Feed
from surefoot.errors import SurefootError
from surefoot.operations import Operations
from surefoot.prepare import Prepared, prepare
from surefoot.protocols import KeyedSource
from surefoot.recipe import Recipe

VARIED = ("compute.compile", "compute.threads", "compute.layout", "data.workers")
"""Keys of operations whose values are tried."""
_ROUNDS = 7
_LEAST_TURN_S = 0.2
_WARM, _WARM_ON_GPU, _WARM_S = 3, 80, 20.0
"""Updates before those that count. On a GPU, where they are captured when the guard's burn-in is over: not
for much longer than these seconds.
"""
_SYNCHRONISED = 8
"""Updates after which a GPU is waited for, as the log does in a run."""
_ENDLESS = 1 << 40
_CLEARLY = 0.97
"""Of the time of the best so far: what is not faster by that much does not replace it."""


@dataclass(frozen=True)
class Tried:
    """An alternative. settings: keys of operations. step_s: median of an update. prepare_s: until the
    first. compiled: see `surefoot.choice.Extent`. beside: time of a whole run over that of the best
    before it, the two measured in turns. why_not: it could not be tried.
    """

    settings: dict[str, Any]
    step_s: float
    prepare_s: float
    compiled: Extent = ""
    beside: float = 1.0
    why_not: str = ""

    def run_s(self, updates: int) -> float:
        """Estimated seconds of a whole run."""
        return self.prepare_s + updates * self.step_s


@dataclass(frozen=True)
class Tuned:
    """What was tried, in order, and the fastest for a run of `total` updates."""

    tried: list[Tried]
    best: Tried
    total: int


def tune_compute(
    recipe: Recipe,
    operations: Operations,
    *,
    held: Collection[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Measures alternatives for a recipe on this machine.

    Args:
        operations: what they are applied to: of what is varied, only the values that are held count.
        held: keys that are not varied.
        say: is told of each.

    Raises:
        UsageError: recipe or operations are not in order.
    """
    threads = torch.get_num_threads()
    try:
        with callers_generators():
            eager = {"compute.compile": "off", "compute.threads": threads}
            made = prepare(recipe, _with(operations, eager))
            tried: list[Tried] = []
            best: Tried | None = None
            for values in _alternatives(recipe, made, threads):
                free = {key: value for key, value in values.items() if key not in held}
                settings = free if best is None else best.settings | free
                if any(settings == one.settings for one in tried):
                    continue
                one = _beside(recipe, operations, settings, best, made.total)
                tried.append(one)
                say(f"{told(one.settings)}: {one.why_not or f'{1e3 * one.step_s:.3g} ms'}")
                if best is None or (not one.why_not and one.beside < _CLEARLY):
                    best = one
    finally:
        torch.set_num_threads(threads)
    assert best is not None
    return Tuned(tried, best, made.total)


def _alternatives(recipe: Recipe, made: Prepared, threads: int) -> Iterator[dict[str, Any]]:
    """What torch does by itself with so many threads; then what is tried on top of the best so far."""
    convolves = any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in made.model.modules())
    keyed = isinstance(recipe.data, KeyedSource)
    layout = {"compute.layout": "contiguous"} if convolves else {}
    workers = {"data.workers": 0} if keyed else {}
    yield {"compute.compile": "off", "compute.threads": threads, **layout, **workers}
    if convolves:
        yield {"compute.layout": "channels_last"}
    fewer = sorted({1, max(1, threads // 2)} - {threads}) if made.device.type == "cpu" else []
    for num in fewer:
        yield {"compute.threads": num}
    for num in [*fewer, threads]:  # what is best for eager steps need not be so
        yield {"compute.compile": "on", "compute.threads": num}
    if keyed:
        for num in sorted({1, threads, 2 * threads}):
            yield {"data.workers": num}


def _beside(
    recipe: Recipe, operations: Operations, settings: dict[str, Any], best: Tried | None, total: int
) -> Tried:
    """An alternative, measured in turns with the best so far."""
    runs: list[_Updates] = []
    try:
        runs.append(_Updates(recipe, operations, settings))
        if best is not None and settings.get("compute.compile") == "on" and not runs[0].choice.compiled:
            return _untried(settings, runs[0].choice.reason)
        if best is not None:
            runs.append(_Updates(recipe, operations, best.settings))
        for turn in range(_ROUNDS):
            for run in runs if turn % 2 else reversed(runs):
                run.turn()
        one, again = runs[0].tried(), runs[-1].tried()
        return replace(one, beside=one.run_s(total) / again.run_s(total))
    except Exception as error:
        if best is None and isinstance(error, SurefootError | OSError | MemoryError):
            raise
        if best is None:
            raise first_failure("first step", error) from error
        return _untried(settings, str(error).splitlines()[0])
    finally:
        for run in runs:
            run.close()


def _untried(settings: dict[str, Any], why_not: str) -> Tried:
    return Tried(settings, float("nan"), 0.0, why_not=why_not)


class _Updates:
    """Updates of a recipe under some settings, to be taken in turns. choice: whether they are compiled."""

    def __init__(self, recipe: Recipe, operations: Operations, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)
        begun = time.perf_counter()
        made = prepare(recipe, _with(operations, settings))
        self.choice = made.choice
        self._threads = torch.get_num_threads()
        feed: Feed = made.feed(lambda kind, **facts: None)
        self._course: Course = made.course(feed, None, Silence(), deque(maxlen=1))  # type: ignore[arg-type]
        self._batches = feed.batches(0, _ENDLESS)
        self._on_gpu = made.device.type == "cuda"
        for num in range(_WARM_ON_GPU if self._on_gpu else _WARM):
            if num < _WARM or time.perf_counter() < begun + _WARM_S:
                self._one()
        self._wait()
        self._prepare_s = time.perf_counter() - begun
        self._times: list[float] = []

    def turn(self) -> None:
        """Some updates, for a fifth of a second at least."""
        torch.set_num_threads(self._threads)
        begun, done = time.perf_counter(), 0
        while time.perf_counter() < begun + _LEAST_TURN_S:
            self._one()
            done += 1
            if done % _SYNCHRONISED == 0:
                self._wait()
        self._wait()
        self._times.append((time.perf_counter() - begun) / done)

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _one(self) -> None:
        update(self._course, next(self._batches))

    def tried(self) -> Tried:
        """What came out."""
        step_s = statistics.median(self._times)
        return Tried(self._settings, step_s, self._prepare_s, self.choice.compiled)

    def close(self) -> None:
        """Ends workers."""
        self._batches.close()


def told(settings: Mapping[str, Any]) -> str:
    """Settings in words."""
    return ", ".join(f"{key.partition('.')[2]} {value}" for key, value in settings.items())


def _with(operations: Operations, settings: Mapping[str, Any]) -> Operations:
    """Operations with other values for dotted keys."""
    values = operations.model_dump()
    for key, value in settings.items():
        *path, leaf = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[leaf] = value
    return Operations(**values)
