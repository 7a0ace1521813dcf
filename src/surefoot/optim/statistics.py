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

    As long as they are still to a part what they were made with, it is less by that part; so in the first
    batch of all there is none.

    Args:
        then, now: before and after a step, of each layer: running mean (1-d), running variance (1-d), and
            number of batches tracked (0-d).
        settings: float32[layers, 2], see `settings_of`.
    """
    least, keeps = settings.unbind(1)
    (variance, square), (new_variance, new_square) = (_moments(at, least) for at in (then, now))
    known = 1.0 - keeps ** torch.stack(list(then[2::3]))
    each = known * torch.maximum(new_square / square, new_variance / variance)
    most: Tensor = torch.where(torch.isfinite(square), each, 0.0).max()
    return most


def _moments(statistics: Sequence[Tensor], least: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean square of each layer, added up over its channels: 1-d."""
    wide = [_wide(t) for t in statistics]
    mean, variance = norms_of(wide[0::3]), norms_of(wide[1::3], 1) + least
    return variance, variance + mean * mean


def growths_on_host(
    then: Sequence[Tensor], now: Sequence[Tensor], settings: Sequence[tuple[float, float]]
) -> list[Grown]:
    """`growth` of each layer by Python's numbers: in less than half the time, if layers are few."""
    found, at = [], 0
    for least, keeps in settings:
        variance, square = _moments_on_host(then[at], then[at + 1], least)
        new_variance, new_square = _moments_on_host(now[at], now[at + 1], least)
        known = 1.0 - keeps ** then[at + 2].item()
        each = known * max(new_square / square, new_variance / variance)  # NaN if the latter is
        kept = keeps ** (now[at + 2].item() - then[at + 2].item())
        added = new_variance - least - kept * (variance - least)
        found.append(Grown(each if math.isfinite(square) else 0.0, added > (1.0 - kept) * least))
        at += 3
    return found


def worst(found: Sequence[Grown]) -> int:
    """The place of the layer that grows most; what is not finite is more than anything."""
    return max(range(len(found)), key=lambda i: g if (g := found[i].growth) == g else math.inf)


def _moments_on_host(mean: Tensor, variance: Tensor, least: float) -> tuple[float, float]:
    mean, added = _wide(mean), _wide(variance).sum().item() + least
    return added, added + torch.dot(mean, mean).item()


def _wide(tensor: Tensor) -> Tensor:
    """In single precision at least: in half sums are soon infinite."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def settings_of(norm: _BatchNorm) -> tuple[float, float]:
    """What is added to its variance, so that none is nothing: its eps, times the channels; and what is kept
    of its statistics with each batch.
    """
    keeps = 0.0 if norm.momentum is None else 1.0 - norm.momentum
    return max(norm.eps * norm.num_features, 1e-30), keeps
