"""Which way to compute is fastest here: measured on a recipe's own batches, each alternative in turns.

What is measured are updates as a run takes them, without a run directory. Layout, threads, compilation and
workers are tried one after another, each beside the best so far: a few minutes do, where all combinations
would take an hour.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
import torch
from torch import nn

from surefoot.course import Course, Silence, callers_generators, first_failure, update
from surefoot.data.feed import Feed
from surefoot.errors import OperationsError, SurefootError
from surefoot.operations import Operations
from surefoot.prepare import Prepared, prepare
from surefoot.protocols import KeyedSource
from surefoot.recipe import Recipe

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
    first. rows: samples in a batch. why_not: it could not be tried.
    """

    settings: dict[str, Any]
    step_s: float
    prepare_s: float
    rows: int
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
    recipe: Recipe, operations: Operations, *, say: Callable[[str], None] = lambda text: None
) -> Tuned:
    """Measures alternatives for a recipe on this machine.

    Args:
        operations: what they are applied to.
        say: is told of each.

    Raises:
        UsageError: recipe or operations are not in order.
    """
    threads_before = torch.get_num_threads()
    tried: list[Tried] = []
    try:
        with callers_generators():
            made = prepare(recipe, _with(operations, {"compute.compile": "off"}))
            total = made.total
            best: Tried | None = None
            for more in _alternatives(recipe, made):
                base = {} if best is None else best.settings
                settings = {"compute.compile": "off", **base, **more}
                one, again = _beside(recipe, operations, settings, best)
                tried.append(one)
                say(f"{told(one.settings)}: {one.why_not or f'{1e3 * one.step_s:.3g} ms'}")
                if one.why_not:
                    continue
                if best is None or one.run_s(total) < _CLEARLY * again.run_s(total):
                    best = one
    finally:
        torch.set_num_threads(threads_before)
    assert best is not None
    return Tuned(tried, best, total)


def _alternatives(recipe: Recipe, made: Prepared) -> Iterator[dict[str, Any]]:
    """Settings to be tried on top of the best so far."""
    now = torch.get_num_threads()
    yield {"compute.threads": now}
    if any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in made.model.modules()):
        yield {"compute.layout": "channels_last"}
    fewer = sorted({1, max(1, now // 2)} - {now}) if made.device.type == "cpu" else []
    for threads in fewer:
        yield {"compute.threads": threads}
    for threads in [*fewer, now]:  # what is best for eager steps need not be so
        yield {"compute.compile": "on", "compute.threads": threads}
    if isinstance(recipe.data, KeyedSource):
        for workers in sorted({1, now, 2 * now}):
            yield {"data.workers": workers}


def _beside(
    recipe: Recipe, operations: Operations, settings: Mapping[str, Any], best: Tried | None
) -> tuple[Tried, Tried]:
    """An alternative and the best so far, measured in turns."""
    runs: list[_Updates] = []
    try:
        runs.append(_Updates(recipe, operations, settings))
        if best is not None:
            runs.append(_Updates(recipe, operations, best.settings))
        for turn in range(_ROUNDS):
            for run in runs if turn % 2 else reversed(runs):
                run.turn()
        measured = [run.tried() for run in runs]
        return measured[0], measured[-1]
    except Exception as error:
        if best is None and isinstance(error, SurefootError | OSError | MemoryError):
            raise
        if best is None:
            raise first_failure("first step", error) from error
        why_not = str(error).splitlines()[0]
        return Tried(dict(settings), float("nan"), 0.0, best.rows, why_not), best
    finally:
        for run in runs:
            run.close()


class _Updates:
    """Updates of a recipe under some settings, to be taken in turns."""

    def __init__(self, recipe: Recipe, operations: Operations, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)
        begun = time.perf_counter()
        made = prepare(recipe, _with(operations, settings))
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
        self._rows = made.plan.batch_size

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
        return Tried(self._settings, statistics.median(self._times), self._prepare_s, self._rows)

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


def write_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Puts dotted settings into a TOML file; what else it holds stays, comments too.

    Raises:
        OperationsError: it is not TOML, or cannot be written.
    """
    try:
        document = tomlkit.parse(path.read_text()) if path.exists() else tomlkit.document()
        for key, value in settings.items():
            section, _, leaf = key.partition(".")
            document.setdefault(section, tomlkit.table())[leaf] = value
        path.write_text(tomlkit.dumps(document))
    except (OSError, ValueError) as error:
        raise OperationsError(f"{path} could not be written: {error}") from None
