"""What the detectors ask of numbers: of Python's on a host, where a call of numpy or torch takes longer
than all they compute, and of 0-d float64 tensors on a device that must not be waited for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Numbers:
    """Floats, and lists of them."""

    isfinite = staticmethod(math.isfinite)
    exp = staticmethod(math.exp)
    log = staticmethod(math.log)
    sqrt = staticmethod(math.sqrt)
    maximum = staticmethod(max)
    minimum = staticmethod(min)
    count = staticmethod(sum)
    together: Any = staticmethod(list)

    @staticmethod
    def where(condition: bool, yes: Any, no: Any) -> Any:
        """One of the two, both of which exist."""
        return yes if condition else no

    @staticmethod
    def number(value: Any) -> float:
        """A float."""
        return float(value)

    @staticmethod
    def median(values: Sequence[float], those: list[bool]) -> float:
        """Of some of the values; not a number without any."""
        kept = Numbers.kept(values, those)
        return statistics.median(kept) if kept else math.nan

    @staticmethod
    def first(values: Sequence[float], those: list[bool]) -> float:
        """Of some of the values; not a number without any."""
        return next(iter(Numbers.kept(values, those)), math.nan)

    @staticmethod
    def finite(one: Sequence[float], other: Sequence[float]) -> list[bool]:
        """Of which pairs both are."""
        isfinite = math.isfinite
        if isfinite(sum(one) + sum(other)):  # then each is: a fourth of the time
            return [True] * len(one)
        return [isfinite(a) and isfinite(b) for a, b in zip(one, other, strict=True)]

    @staticmethod
    def kept(values: Sequence[float], those: list[bool]) -> list[float]:
        """Some of the values."""
        return [value for value, keep in zip(values, those, strict=True) if keep]

    @staticmethod
    def distances(values: Sequence[float], of: float) -> list[float]:
        """Of each from a number."""
        return [abs(value - of) for value in values]

    @staticmethod
    def logs(values: Sequence[float], least: float) -> list[float]:
        """Logarithms; `least` stands for what is below, and for what is no number."""
        log = math.log
        return [log(value if value > least else least) for value in values]

    @staticmethod
    def winsorised(
        values: Sequence[float], those: list[bool], mean: float, most: float
    ) -> tuple[float, float]:
        """Sum and sum of squares of some values' distances from `mean`, each of `most` at most."""
        total = squares = 0.0
        for value in values if all(those) else Numbers.kept(values, those):
            d = value - mean
            if d > most:
                d = most
            elif d < -most:
                d = -most
            total += d
            squares += d * d
        return total, squares

    @staticmethod
    def highest(
        values: Sequence[float], norms: Sequence[float], those: list[bool], most: float, most_norm: float
    ) -> float:
        """The highest of some of the values, of those that are at most `most` and whose norm is at most
        `most_norm`; minus infinity without any.
        """
        if all(those) and max(norms) <= most_norm and (top := max(values)) <= most:
            return top
        found = zip(values, norms, those, strict=True)
        return max((v for v, n, keep in found if keep and v <= most and n <= most_norm), default=-math.inf)


class Tensors:
    """The same of 0-d float64 tensors, and of float64[n]; see `Numbers`. Nothing waits for the device."""

    isfinite = staticmethod(torch.isfinite)
    exp = staticmethod(torch.exp)
    log = staticmethod(torch.log)
    sqrt = staticmethod(torch.sqrt)
    maximum = staticmethod(torch.maximum)
    minimum = staticmethod(torch.minimum)
    together = staticmethod(torch.stack)
    where = staticmethod(torch.where)

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def number(self, value: Any) -> Tensor:
        """A 0-d tensor."""
        if isinstance(value, Tensor):
            return value.to(self._device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self._device)  # a copy would wait

    @staticmethod
    def median(values: Tensor, those: Tensor) -> Tensor:
        """As a quantile: the middle of the two in the middle."""
        return torch.nanquantile(torch.where(those, values, torch.nan), 0.5)

    @staticmethod
    def first(values: Tensor, those: Tensor) -> Tensor:
        """See `Numbers.first`."""
        place = those.double().argmax().unsqueeze(0)  # of the first; an index by a 0-d tensor would wait
        return torch.where(those.any(), values.gather(0, place)[0], torch.nan)

    @staticmethod
    def count(those: Tensor) -> Tensor:
        """How many are true."""
        return those.double().sum()  # a count times a number would be of torch's default dtype

    @staticmethod
    def finite(one: Tensor, other: Tensor) -> Tensor:
        """Of which pairs both are."""
        return torch.isfinite(one) & torch.isfinite(other)

    @staticmethod
    def distances(values: Tensor, of: Tensor) -> Tensor:
        """Of each from a number."""
        return (values - of).abs()

    @staticmethod
    def logs(values: Tensor, least: float) -> Tensor:
        """See `Numbers.logs`."""
        return torch.log(torch.where(values > least, values, least))

    @staticmethod
    def winsorised(values: Tensor, those: Tensor, mean: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        """See `Numbers.winsorised`."""
        d = torch.where(those, values - mean, 0.0)
        d = torch.minimum(torch.maximum(d, -most), most)
        return d.sum(), (d * d).sum()

    @staticmethod
    def highest(values: Tensor, norms: Tensor, those: Tensor, most: Tensor, most_norm: Tensor) -> Tensor:
        """See `Numbers.highest`."""
        keep = those & (values <= most) & (norms <= most_norm)
        return torch.where(keep, values, -torch.inf).amax()
