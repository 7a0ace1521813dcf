"""The feed: brings the samples of the plan to the device, in the plan's order, from any step."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from surefoot.data.plan import Plan
from surefoot.errors import DataError
from surefoot.keys import key, words
from surefoot.protocols import KeyedSource
from surefoot.types import HOLE, Minibatch, Slots, Tree, leaves, map_leaves

_MOST_REPLACED = 3
"""Replacements without one batch between them."""
_LOOKS_S = 1.0
"""How often whoever waits for a worker looks whether it is alive."""


def _unheard(kind: str, **facts: Any) -> None:
    pass


@dataclass(frozen=True)
class Feed:
    """Batches of a source by step.

    Neither `workers` nor `prefetch` changes what is delivered: each batch is fetched by its step
    alone, so there is nothing in flight that belongs to the state of a run.

    Args:
        source: a `Source` or `KeyedSource`.
        plan: which samples are in which step.
        seed: of the random draws of a keyed source.
        device: where batches go.
        workers: processes that fetch; 0 fetches in this one. Arrays never need any.
        prefetch: batches that each worker keeps ready.
        timeout_s: how long a worker may take for a batch before it is replaced.
        notice: told of workers that were replaced, as an event: kind and facts.
        name: of the source in messages: ``data`` or ``validation``.
    """

    source: Any
    plan: Plan
    seed: int
    device: torch.device
    workers: int = 0
    prefetch: int = 2
    timeout_s: float = 600.0
    notice: Callable[..., None] = _unheard
    name: str = "data"
    _keyed: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_keyed", isinstance(self.source, KeyedSource))

    def batches(self, start: int, stop: int) -> Generator[Minibatch, None, None]:
        """Batches of steps ``start..stop``, in order. Closing it ends the workers."""
        if not (self.workers and self._keyed) or start >= stop:
            return (self.at(step) for step in range(start, stop))
        return self._from_workers(start, stop)

    def _from_workers(self, start: int, stop: int) -> Generator[Minibatch, None, None]:
        """Batches fetched by processes. If one of them dies or hangs, all are replaced, and go on with the
        batch that is missing: what a batch holds depends on its step alone.
        """
        step, num_replaced = start, 0
        while step < stop:
            workers = _started(self._loader(step, stop))
            try:
                while step < stop:
                    data, trouble = _next(workers, self.timeout_s)
                    if trouble:
                        num_replaced += 1
                        self.notice("worker_replaced", step=step, source=self.name, **trouble)
                        if num_replaced > _MOST_REPLACED:
                            raise _given_up(self.name, step, trouble)
                        break
                    yield self._minibatch(self.plan.at(step), data)
                    step, num_replaced = step + 1, 0
            finally:
                _end(workers)

    def _loader(self, start: int, stop: int) -> DataLoader[Tree]:
        return DataLoader(
            _Fetches(self),
            batch_size=None,
            sampler=range(start, stop),
            num_workers=min(self.workers, stop - start),
            prefetch_factor=self.prefetch,
            collate_fn=_as_it_is,
            worker_init_fn=_enter_worker,
            timeout=_LOOKS_S,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # or it would draw from the global one
        )

    def at(self, step: int) -> Minibatch:
        """The batch of one step, fetched in this process."""
        slots = self.plan.at(step)
        return self._minibatch(slots, self.fetch(slots))

    def fetch(self, slots: Slots) -> Tree:
        """Rows for all slots, on the CPU. Holes get a copy of a sample of the same batch: a row of
        zeros could be a value that the model cannot take, and its weight is zero anyway.
        """
        ids = slots.ids
        if slots.num_samples < len(ids):
            ids = np.where(ids == HOLE, ids[ids != HOLE][0], ids)
        if not self._keyed:
            return self.source.fetch(ids)
        epochs = slots.epochs if slots.epochs is not None else np.full(len(ids), slots.epoch)
        keys = np.empty(len(ids), np.uint64)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            keys[now] = words(key(self.seed, "sample", epoch), ids[now])
        return self.source.fetch_keyed(ids, keys)

    def _minibatch(self, slots: Slots, data: Tree) -> Minibatch:
        rows = len(slots.ids)
        for leaf in leaves(data):
            if isinstance(leaf, Tensor) and (leaf.ndim == 0 or len(leaf) != rows):
                raise DataError(
                    f"{self.name}: fetch of {rows} ids returned a tensor of shape "
                    f"{tuple(leaf.shape)} in step {slots.step}.",
                    why="Each tensor must have one row per id.",
                    fix="Return shape (n, ...) for n ids, in their order.",
                )
        weights = None
        if slots.num_samples < rows:
            weights = torch.from_numpy((slots.ids != HOLE).astype(np.float32)).to(self.device)
        if self.device.type != "cpu":
            data = map_leaves(self._move, data)
        return Minibatch(slots, data, weights, rows)

    def _move(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if self.device.type == "cuda":  # pinned, so that the copy does not wait for the device
            leaf = leaf.pin_memory()
        return leaf.to(self.device, non_blocking=True)


def _processes(workers: Any) -> list[Any]:
    """The processes behind torch's iterator, which has no public name for them."""
    return list(getattr(workers, "_workers", ()))


def _started(loader: DataLoader[Tree]) -> Iterator[Tree]:
    """The loader's iterator, with its workers running.

    Torch has the death of a worker raise an error in whatever the main thread does at that moment, within
    an update too. That handler is taken back: whoever waits for the worker notices.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before)


def _next(workers: Iterator[Tree], timeout_s: float) -> tuple[Tree, dict[str, Any]]:
    """The next rows; or, if none come, which workers died or hang."""
    begun = time.monotonic()
    while True:
        try:
            return next(workers), {}
        except RuntimeError as error:
            known = "exited unexpectedly" in str(error) or "timed out after" in str(error)
            if not known:  # an error within the dataset
                raise
        processes = _processes(workers)
        dead = {p.pid: p.exitcode for p in processes if p.exitcode is not None}
        if dead:
            codes = [dead[pid] for pid in sorted(dead)]
            return None, {"reason": "died", "workers": sorted(dead), "exit_codes": codes}
        if time.monotonic() - begun > timeout_s:
            return None, {"reason": "hung", "workers": [p.pid for p in processes]}


def _given_up(name: str, step: int, trouble: dict[str, Any]) -> DataError:
    return DataError(
        f"{name}: the workers {trouble['reason']} {_MOST_REPLACED + 1} times over step {step}.",
        why=f"The last were processes {trouble['workers']}"
        + (f", which ended with {trouble['exit_codes']}" if "exit_codes" in trouble else "")
        + "; -9 is mostly the system's way to end what takes too much memory.",
        fix="Look at the samples of this step (open_run(...).plan.ids(step)) with data.workers=0; or "
        "give fewer workers, or a longer data.timeout.",
    )


def _end(workers: Any) -> None:
    """Ends worker processes without waiting for one that hangs."""
    for process in _processes(workers):
        if process.exitcode is None:
            process.kill()


class _Fetches(TorchDataset[Tree]):
    """What a worker runs: step -> rows."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __getitem__(self, step: int) -> Tree:
        return self._feed.fetch(self._feed.plan.at(step))


def _as_it_is(fetched: Tree) -> Tree:
    """Torch's default would turn arrays into tensors and tuples into lists."""
    return fetched


def _outlive_one(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def _enter_worker(_: int) -> None:
    """A worker leaves Ctrl-C to the main process, and dies with it even if that is killed.

    A scheduler sends SIGTERM to all processes of a job: the first is for the main process, which then
    finishes its step; a second one, as torch's loader sends to a worker that hangs, ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive_one)
    try:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    except (OSError, AttributeError):  # not Linux: torch's own watchdog ends it within seconds
        pass
