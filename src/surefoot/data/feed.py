"""The feed: brings the samples of the plan to the device, in the plan's order, from any step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from surefoot.data.plan import Plan
from surefoot.data.pool import Pool
from surefoot.data.sources import Arrays
from surefoot.data.workers import LOOKS_S, Watch, as_it_is, end, enter, next_of, started
from surefoot.errors import DataError, WorkerError
from surefoot.keys import key, words
from surefoot.protocols import KeyedSource
from surefoot.types import HOLE, Minibatch, Slots, Tree, leaves, map_leaves

_MOST_STEPS, _CHUNK_BYTES, _LINE_BYTES = 32, 1 << 20, 64
_MOST_REPLACED = 3
"""Replacements without one batch between them."""


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
    notice: Callable[..., object] = _unheard
    name: str = "data"
    _keyed: bool = field(init=False, repr=False)
    _gathers: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_keyed", isinstance(self.source, KeyedSource))
        object.__setattr__(self, "_gathers", self._most_steps())

    @property
    def at_hand(self) -> bool:
        """Whether batches are copied out of arrays, in a moment; a derived class may do something else."""
        return isinstance(self.source, Arrays) and type(self.source).fetch is Arrays.fetch

    def _most_steps(self) -> int:
        """Steps that are gathered in one call: what stays in a cache, if each begins with a line of it."""
        if not self.at_hand:
            return 1
        row_bytes: list[int] = self.source.row_bytes()
        sizes = [num * self.plan.batch_size for num in row_bytes]
        if any(size % _LINE_BYTES for size in sizes):
            return 1
        return max(1, min(_MOST_STEPS, _CHUNK_BYTES // max(1, sum(sizes))))

    def batches(self, start: int, stop: int) -> Generator[Minibatch, None, None]:
        """Batches of steps ``start..stop``, in order. Closing it ends the workers."""
        if self.workers and self._keyed and start < stop:
            return self._from_workers(start, stop)
        if self._gathers > 1:
            return self._in_chunks(start, stop)
        return (self.at(step) for step in range(start, stop))

    def _in_chunks(self, start: int, stop: int) -> Generator[Minibatch, None, None]:
        """Gathers batches of some steps in one call, short ones each by itself. Where one begins in memory
        depends on its step alone, and not on `start`: kernels may round otherwise for another alignment.
        """
        most = self._gathers
        pool = Pool(self.source.arrays(), most * self.plan.batch_size)
        first = start // most * most
        while first < stop:
            short, last = self.plan.next_short(first), min(stop, first // most * most + most)
            if first == short:
                last = first + 1
                if last > start:
                    yield self.at(first)
            else:
                last = last if short is None else min(last, short)
                if last > start:
                    self._check_length()
                    slots, ids = self.plan.whole(first, last)
                    yield from self._handed_out(slots, pool.gather(ids), max(start - first, 0))
            first = last

    def _handed_out(self, slots: list[Slots], gathered: list[Tensor], start: int) -> Iterator[Minibatch]:
        """Batches out of the rows of all, from the one numbered `start`. Nothing of them is left behind, so
        that their memory can be the next ones'.
        """
        size, here, nest = self.plan.batch_size, self.device.type == "cpu", self.source.nest
        there = gathered if here else [self._move(leaf) for leaf in gathered]  # at once: few large copies
        parts = [torch.unsafe_split(leaf, size) for leaf in there]  # which autograd takes for no views
        for i in range(start, len(slots)):
            yield Minibatch(slots[i], nest([part[i] for part in parts]), None, size)

    def _from_workers(self, start: int, stop: int) -> Generator[Minibatch, None, None]:
        """Batches fetched by processes. If one of them dies or hangs, all are replaced, and go on with the
        batch that is missing: what a batch holds depends on its step alone.
        """
        step, num_replaced = start, 0
        while step < stop:
            workers = started(self._loader(step, stop))
            watch = Watch(workers)
            try:
                while step < stop:
                    data, trouble = next_of(workers, self.timeout_s, watch)
                    if trouble:
                        num_replaced += 1
                        self.notice("worker_replaced", step=step, source=self.name, **trouble)
                        if num_replaced > _MOST_REPLACED:
                            raise _given_up(self.name, step, trouble)
                        break
                    yield self._minibatch(self.plan.at(step), data)
                    step, num_replaced = step + 1, 0
            finally:
                watch.close()
                end(workers)

    def _loader(self, start: int, stop: int) -> DataLoader[Tree]:
        return DataLoader(
            _Fetches(self),
            batch_size=None,
            sampler=range(start, stop),
            num_workers=min(self.workers, stop - start),
            prefetch_factor=self.prefetch,
            collate_fn=as_it_is,
            worker_init_fn=enter,
            timeout=LOOKS_S,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # or it would draw from the global one
        )

    def at(self, step: int) -> Minibatch:
        """The batch of one step, fetched in this process."""
        slots = self.plan.at(step)
        try:
            data = self.fetch(slots)
        except Exception:
            self._check_length()  # the likelier reason
            raise
        return self._minibatch(slots, data)

    def _check_length(self) -> None:
        if len(self.source) != self.plan.num_samples:
            raise DataError(
                f"{self.name} has {len(self.source):,} samples now, and had {self.plan.num_samples:,} when "
                "the run began.",
                why="Which samples are in which step depends on how many there are.",
                fix="Restore the data, or train on the new ones with another --out.",
            )

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
        self._check_length()
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
        return Minibatch(slots, self._on_device(data), weights, rows)

    def _on_device(self, data: Tree) -> Tree:
        return data if self.device.type == "cpu" else map_leaves(self._move, data)

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


def _given_up(name: str, step: int, trouble: dict[str, Any]) -> WorkerError:
    return WorkerError(
        f"{name}: the workers {trouble['reason']} {_MOST_REPLACED + 1} times over step {step}.",
        why=f"The last were processes {trouble['workers']}"
        + (f", which ended with {trouble['exit_codes']}" if "exit_codes" in trouble else "")
        + "; -9 is mostly the system's way to end what takes too much memory.",
        fix="Look at the samples of this step (open_run(...).plan.ids(step)) with data.workers=0; or "
        "give fewer workers, or a longer data.timeout.",
    )
