"""The feed: brings the samples of the plan to the device, in the plan's order, from any step."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Generator, Iterable
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
        name: of the source in messages: ``data`` or ``validation``.
    """

    source: Any
    plan: Plan
    seed: int
    device: torch.device
    workers: int = 0
    prefetch: int = 2
    name: str = "data"
    _keyed: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_keyed", isinstance(self.source, KeyedSource))

    def batches(self, start: int, stop: int) -> Generator[Minibatch, None, None]:
        """Batches of steps ``start..stop``, in order. Closing it ends the workers."""
        if not (self.workers and self._keyed) or start >= stop:
            return (self.at(step) for step in range(start, stop))
        loader = DataLoader(
            _Fetches(self),
            batch_size=None,
            sampler=range(start, stop),
            num_workers=min(self.workers, stop - start),
            prefetch_factor=self.prefetch,
            collate_fn=_as_it_is,
            worker_init_fn=_enter_worker,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # or it would draw from the global one
        )
        return self._deliver(range(start, stop), loader)

    def _deliver(self, steps: Iterable[int], fetched: Iterable[Tree]) -> Generator[Minibatch, None, None]:
        for step, data in zip(steps, fetched, strict=True):
            yield self._minibatch(self.plan.at(step), data)

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
