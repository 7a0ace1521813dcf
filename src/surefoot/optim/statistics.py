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
_ENOUGH_ROWS = 16
_NOTHING = 1e-9
"""What is left of a variance of one is then lost in the digits of others."""


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
        settings: float32[layers, 3], see `settings_of`.
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
    wide, (least, keeps, begun) = [_wide(t) for t in statistics], settings.unbind(1)
    left = keeps ** torch.stack(list(statistics[2::3]))
    by_batches = [v - of for v, of in zip(wide[1::3], (left * begun).unbind(), strict=True)]
    mean, variance = norms_of(wide[0::3]), norms_of(by_batches, 1) + least
    return variance, variance + mean * mean, 1.0 - left


def growths_on_host(
    then: Sequence[Tensor], now: Sequence[Tensor], settings: Sequence[tuple[float, float, float]]
) -> list[Grown]:
    """`growth` of each layer by Python's numbers: in less than half the time, if layers are few."""
    found, at = [], 0
    for least, keeps, begun in settings:
        left, kept = keeps ** then[at + 2].item(), keeps ** (now[at + 2].item() - then[at + 2].item())
        variance, square = _moments_on_host(then[at], then[at + 1], least, left * begun)
        new_variance, new_square = _moments_on_host(now[at], now[at + 1], least, left * kept * begun)
        each = (1.0 - left) * max(new_square / square, new_variance / variance)  # NaN if the latter is
        added = new_variance - least - kept * (variance - least)
        found.append(Grown(each if math.isfinite(square) else 0.0, added > (1.0 - kept) * least))
        at += 3
    return found


def worst(found: Sequence[Grown]) -> int:
    """The place of the layer that grows most; what is not finite is more than anything."""
    return max(range(len(found)), key=lambda i: g if (g := found[i].growth) == g else math.inf)


def _moments_on_host(mean: Tensor, variance: Tensor, least: float, left: float) -> tuple[float, float]:
    mean, variance = _wide(mean), _wide(variance)
    if left > _NOTHING:
        variance = (variance - left).abs()
    added = variance.sum().item() + least
    return added, added + torch.dot(mean, mean).item()


def _wide(tensor: Tensor) -> Tensor:
    """In single precision at least: in half sums are soon infinite."""
    return tensor if tensor.dtype in _WIDE else tensor.float()


def settings_of(norm: _BatchNorm, rows: int) -> tuple[float, float, float]:
    """What is added to its variance, so that none is nothing: its eps, times the channels; what is kept
    of its statistics with each batch; and the variance that each channel was made with, in which no batch
    has a part. That is 0 where it is not known, since the layer comes with statistics or keeps them in half
    precision; and with few rows in a batch, of which the first are no measure for the next.
    """
    variance, num_batches = norm.running_var, norm.num_batches_tracked
    assert variance is not None
    assert num_batches is not None
    keeps = 0.0 if norm.momentum is None else 1.0 - norm.momentum
    begun, alike = variance[0].item(), bool((variance == variance[0]).all())
    known = alike and not num_batches.item() and variance.dtype in _WIDE and rows >= _ENOUGH_ROWS
    return max(norm.eps * norm.num_features, 1e-30), keeps, begun if known else 0.0
