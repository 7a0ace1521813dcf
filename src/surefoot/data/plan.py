"""The plan: which samples are in which update. A pure function of the step; needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np

from surefoot.data.order import ALGORITHM, Order
from surefoot.errors import RecipeError, StateError
from surefoot.types import HOLE, Duration, Ids, Slots

Tail = Literal["keep", "drop", "straddle", "pad"]


@dataclass(frozen=True)
class Plan:
    """Sample ids of every update of an endless run.

    With N samples and batch size B, an epoch's tail (N mod B samples) is

    * ``keep``: a short last batch (the default);
    * ``drop``: left out of that epoch;
    * ``straddle``: filled up from the next epoch: update t owns slots [tB, (t+1)B) of one endless
      stream, and there is no tail;
    * ``pad``: filled up with holes of weight zero, so that all batches have B rows.

    No policy ever repeats a sample within an epoch.
    """

    num_samples: int
    batch_size: int
    tail: Tail = "keep"
    shuffle: bool = True
    seed: int = 0
    algorithm: str = ALGORITHM
    _order: Order = field(init=False, repr=False, compare=False)
    _per_epoch: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise RecipeError("the data is empty.", fix="Give a source with at least one sample.")
        if self.batch_size < 1:
            raise RecipeError(f"batch.size = {self.batch_size} must be at least 1.")
        if self.tail not in get_args(Tail):
            raise RecipeError(
                f"batch.tail = {self.tail!r} is unknown.", fix=f"Use one of {get_args(Tail)}."
            )
        if self.tail == "drop" and self.batch_size > self.num_samples:
            raise RecipeError(
                f"batch.size = {self.batch_size} with tail='drop' leaves no batch at all.",
                why=f"There are only {self.num_samples} samples.",
                fix="Use a smaller batch, or tail='keep'.",
            )
        if self.algorithm != ALGORITHM:
            raise StateError(f"the order {self.algorithm!r} is not known to this version.")
        order = Order(self.num_samples, seed=self.seed, shuffle=self.shuffle)
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_per_epoch", int(self.updates_per_epoch))

    @property
    def updates_per_epoch(self) -> Fraction:
        """Updates in an epoch: whole, except for `straddle`."""
        n, b = self.num_samples, self.batch_size
        whole = {"keep": -(-n // b), "pad": -(-n // b), "drop": n // b}.get(self.tail)
        return Fraction(n, b) if whole is None else Fraction(whole)

    def at(self, step: int) -> Slots:
        """Slots of update `step`, counted from 0."""
        if step < 0:
            raise IndexError(f"steps count from 0, got {step}")
        return self._at(step, ahead=False)

    def _at(self, step: int, *, ahead: bool) -> Slots:
        """ahead: see `Order.take`."""
        n, b = self.num_samples, self.batch_size
        if self.tail == "straddle":
            return self._straddling(step, ahead)
        epoch, index = divmod(step, self._per_epoch)
        ids = self._order.take(epoch, index * b, min((index + 1) * b, n), ahead=ahead)
        num_samples = len(ids)
        if self.tail == "pad" and num_samples < b:
            ids = np.concatenate([ids, np.full(b - num_samples, HOLE, np.int64)])
        return Slots(step, epoch, ids, None, num_samples)

    def next_short(self, step: int) -> int | None:
        """The first update from `step` on whose batch has fewer samples than the others; None: none has."""
        if self.tail in ("drop", "straddle") or self.num_samples % self.batch_size == 0:
            return None
        return step // self._per_epoch * self._per_epoch + self._per_epoch - 1

    def whole(self, first: int, stop: int) -> tuple[list[Slots], Ids]:
        """Slots of updates ``first..stop``, of which no batch is a short one, and their ids in one array.
        Within an epoch this is a fraction of the work of `at` for each.
        """
        n, b, num = self.num_samples, self.batch_size, stop - first
        per_epoch = n if self.tail == "straddle" else self._per_epoch * b
        epoch, start = divmod(first * b, per_epoch)
        if start + num * b > min(n, per_epoch):
            slots = [self._at(step, ahead=True) for step in range(first, stop)]
            return slots, np.concatenate([s.ids for s in slots])
        ids = self._order.take(epoch, start, start + num * b, ahead=True).copy()
        return [Slots(first + i, epoch, ids[i * b : (i + 1) * b], None, b) for i in range(num)], ids

    def _straddling(self, step: int, ahead: bool) -> Slots:
        n, b = self.num_samples, self.batch_size
        epoch, start = divmod(step * b, n)
        if start + b <= n:
            return Slots(step, epoch, self._order.take(epoch, start, start + b, ahead=ahead), None, b)
        ids, epochs, slot = [], [], step * b
        while slot < (step + 1) * b:
            e, position = divmod(slot, n)
            stop = min(n, position + (step + 1) * b - slot)
            ids.append(self._order.take(e, position, stop, ahead=ahead))
            epochs.append(np.full(stop - position, e, np.int64))
            slot += stop - position
        return Slots(step, epoch, np.concatenate(ids), np.concatenate(epochs), b)

    def ids(self, step: int) -> Ids:
        """Sample ids of update `step`: int64[B]; -1 marks a hole of weight zero."""
        return self.at(step).ids

    def samples(self, updates: int) -> int:
        """Samples consumed by the first `updates` updates; holes do not count."""
        if self.tail == "straddle":
            return updates * self.batch_size
        epochs, rest = divmod(updates, int(self.updates_per_epoch))
        if self.tail == "drop":
            return updates * self.batch_size
        return epochs * self.num_samples + min(rest * self.batch_size, self.num_samples)

    def epochs(self, updates: int) -> Fraction:
        """Position after `updates` updates, in epochs."""
        return Fraction(updates) / self.updates_per_epoch

    def updates(self, length: Duration, *, of: int | None, name: str) -> int:
        """A duration as a number of updates; `of` is the length of the run, for percentages.

        Epochs and samples round up to the update that completes them.

        Raises:
            RecipeError: seconds, or a percentage where there is nothing to take it of.
        """
        match length.unit:
            case "updates":
                return int(length.value)
            case "ep":
                return math.ceil(length.value * self.updates_per_epoch)
            case "samples":
                if self.tail in ("drop", "straddle"):
                    return math.ceil(length.value / self.batch_size)
                epochs, rest = divmod(length.value, self.num_samples)
                return int(epochs * self.updates_per_epoch) + math.ceil(rest / self.batch_size)
            case "%" if of is not None:
                if length.value > 100:
                    raise RecipeError(f"{name} = {str(length)!r} is longer than the run.")
                return round(length.value * of / 100)
        raise RecipeError(
            f"{name} = {str(length)!r} cannot be met.",
            why="A share of the run needs a run of known length."
            if length.unit == "%"
            else "What is learned must not depend on the clock.",
            fix='Use updates (700), epochs ("20ep") or samples ("1e6samples").',
        )

    def cadence(self, every: Duration, *, of: int, name: str) -> Cadence:
        """When something happens that is to happen `every` so often."""
        if every.unit == "ep":
            return Cadence(every.value * self.updates_per_epoch)
        return Cadence(Fraction(max(1, self.updates(every, of=of, name=name))))

    def describe(self) -> dict[str, Any]:
        """All that is needed to make the same plan again, as JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}


@dataclass(frozen=True, slots=True)
class Cadence:
    """Due after the updates that complete a multiple of `period` (in updates, may be fractional)."""

    period: Fraction

    def after(self, done: int) -> int:
        """The least number of updates above `done` at which it is due."""
        return math.ceil((done // self.period + 1) * self.period)
