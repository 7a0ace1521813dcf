"""Running statistics of batch norms, which only validation uses, and by what a step changes them.

A batch is normalised by statistics of its own, so samples far out of range hardly show in its loss or in
its gradient. But its statistics go into the running ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from surefoot.optim.gradients import norms_of

_WIDE = torch.float32, torch.float64
ENOUGH_ROWS = 32
_ROUNDING = 1e-6
_NOTHING = 1e-12
"""Of a variance: not worth taking off."""


class Grown(NamedTuple):
    """What a step makes of a layer's running statistics. growth: see `growth`. sees: the layer's input
    varies by more than nothing.
    """

    growth: float
    sees: bool


def growth(then: Sequence[Tensor], now: Sequence[Tensor], settings: Tensor) -> Tensor:
    """By what the running variance of a batch norm, added up over its channels, has grown, or its running
    mean square, if that has grown by more; of the layer for which that is most. 0-d; not finite if one of
    them is no longer.

    What is left in them of what they were made with is taken off, and the growth is less by that part; so
    in the first batch of all there is none. Made of batches a and b, the second growth is 0.09 + 0.1 b / a.

    Args:
        then, now: before and after a step, of each layer: running mean (1-d), running variance (1-d), and
            number of batches tracked (0-d).
        settings: float32[layers, 4], see `Settings`.
    """
    (variance, square, known), (new_variance, new_square, _) = (
        _moments(at, settings) for at in (then, now)
    )
    each = known * torch.maximum(new_square / square, new_variance / variance)
    most: Tensor = torch.where(torch.isfinite(square), each, 0.0).max()
    return most


def _moments(statistics: Sequence[Tensor], settings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variance and mean square of each layer, added up over its channels, and the part of them that batches
    have made: 1-d.
    """
    wide, (least, keeps, begun, lost) = [_wide(t) for t in statistics], settings.unbind(1)
    left = keeps ** torch.stack(list(statistics[2::3]))
    by_batches = [v - of for v, of in zip(wide[1::3], (left * begun).unbind(), strict=True)]
    mean, variance = norms_of(wide[0::3]), norms_of(by_batches, 1) + least + left * lost
    return variance, variance + mean * mean, 1.0 - left


def growths_on_host(
    then: Sequence[Tensor], now: Sequence[Tensor], settings: Sequence[Settings]
) -> list[Grown]:
    """`growth` of each layer by Python's numbers: in less than half the time, if layers are few."""
    found, at = [], 0
    for one in settings:
        least, keeps, _, _ = one
        left, kept = keeps ** then[at + 2].item(), keeps ** (now[at + 2].item() - then[at + 2].item())
        variance, square = _moments_on_host(then[at], then[at + 1], one, left)
        new_variance, new_square = _moments_on_host(now[at], now[at + 1], one, left * kept)
        each = (1.0 - left) * max(new_square / square, new_variance / variance)  # NaN if the latter is
        added = new_variance - least - kept * (variance - least)
        found.append(Grown(each if math.isfinite(square) else 0.0, added > (1.0 - kept) * least))
        at += 3
    return found


def worst(found: Sequence[Grown]) -> int:
    """The place of the layer that grows most; what is not finite is more than anything."""
    return max(range(len(found)), key=lambda i: g if (g := found[i].growth) == g else math.inf)


def _moments_on_host(mean: Tensor, variance: Tensor, one: Settings, left: float) -> tuple[float, float]:
    mean, variance = _wide(mean), _wide(variance)
    if left * one.begun > _NOTHING:
        variance = (variance - left * one.begun).abs()
    added = variance.sum().item() + one.least + left * one.lost
    return added, added + torch.dot(mean, mean).item()


class Seen(NamedTuple):
    """What a layer sees of a batch alone. variance: added up over its channels, but for a factor that is
    the same for each batch; 0 if it is less than counts. part: what running statistics get of the batch.
    """

    variance: float
    part: float


def seen(variance: Tensor, num_batches: Tensor, one: Settings) -> Seen:
    """By running statistics that began with none."""
    added, kept = variance.double().sum().item(), one.keeps ** num_batches.item()
    part = 1.0 - kept if one.keeps else 0.1  # torch's default, where it is not the same for each batch
    return Seen(0.0 if added <= part * one.least else added, part)


def _wide(tensor: Tensor) -> Tensor:
    """In single precision at least: in half sums are soon infinite."""
    return tensor if tensor.dtype in _WIDE else tensor.float()


class Settings(NamedTuple):
    """Of a layer. least: what is added to its variance, so that none is nothing: its eps, times the
    channels. keeps: what is kept of its statistics with each batch. begun: the variance that each channel
    was made with, in which no batch has a part. lost: of that, over all channels, by rounding.

    begun is 0 where it is not known, since the layer comes with statistics or keeps them in half precision;
    and with few rows in a batch, of which the first are no measure for the next.
    """

    least: float
    keeps: float
    begun: float
    lost: float


def settings_of(norm: _BatchNorm, rows: int) -> Settings:
    """Of a layer before its first batch, and with that many rows in each."""
    variance, num_batches = norm.running_var, norm.num_batches_tracked
    assert variance is not None
    assert num_batches is not None
    keeps = 0.0 if norm.momentum is None else 1.0 - norm.momentum
    begun, alike = variance[0].item(), bool((variance == variance[0]).all())
    known = alike and not num_batches.item() and variance.dtype in _WIDE and rows >= ENOUGH_ROWS
    begun = begun if known else 0.0
    return Settings(
        max(norm.eps * norm.num_features, 1e-30), keeps, begun, _ROUNDING * abs(begun) * norm.num_features
    )
