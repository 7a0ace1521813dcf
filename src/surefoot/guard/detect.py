"""Detectors within a step: is this update to be applied, and at what length?

Written once, for a host and for a device that must not be waited for: `xp` is numpy or torch. All
arithmetic is in float64.

Statistics are running means and variances, taken up in blocks of `BLOCK` steps. They are winsorised: an
outlier counts as six standard deviations, so one spike hardly moves them, and a lasting change is taken up
within some hundred steps. They begin with the median and the median absolute deviation of the first
`BURN_IN` steps. Of the norm of the gradient it is the logarithm that is watched: false alarms of a test on
the norm itself are common where it is skewed (cf. ZClip, Kumar et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

BURN_IN = 64
BLOCK = 32
EARLIEST = 1
"""Steps after which a crude judgement is possible."""
FINE, NOT_FINITE, GRADIENT_SPIKE, LOSS_SPIKE, SAT_OUT = 0, 1, 2, 3, 4
"""Verdicts on a step. Sat out: the guard had decided before that it should be."""

_KEEP = 0.98**BLOCK  # of the running statistics, per block
_INFLATION = 1.03  # makes up for the variance that winsorising takes away
_WINSOR = 6.0  # standard deviations
_LEAST_DEVIATION = 0.05  # of the log norm
_HIGH = 0.5  # of the first loss
_TINY = 1e-30
_NEARLY = 1 - 1e-9

Scalar = Any
"""A float or a 0-d float64 tensor."""


class Statistics(NamedTuple):
    """Running means and variances, float64[2]: of the log of the gradient's norm [0], of the loss [1].
    first: the first loss.
    """

    mean: Any
    var: Any
    first: Scalar


class Decision(NamedTuple):
    """verdict: `FINE`, or why the update should be refused. clip: what its gradient is to be multiplied
    by, at most 1. high: whether the loss is so high that it is a spike if the next one is, too.
    """

    verdict: Scalar
    clip: Scalar
    high: Scalar


class _Bounds(NamedTuple):
    wild: float
    ratio: float
    wild_loss: float
    rise: float
    long: float
    long_ratio: float


_USUAL = _Bounds(6.0, math.log(10.0), wild_loss=12.0, rise=3.0, long=3.0, long_ratio=math.log(2.0))
_EARLY = _Bounds(12.0, math.log(30.0), wild_loss=12.0, rise=30.0, long=12.0, long_ratio=math.log(30.0))


def judge(
    xp: Any, seen: Statistics | None, loss: Scalar, norm: Scalar, *, was_high: Scalar, early: bool = False
) -> Decision:
    """The decision on a step with this loss and norm of its gradient, before clipping: arrays or tensors.

    seen: statistics of the steps before; None for the first, when only finiteness is asked for.
    was_high: of the decision on the step before.
    early: within the burn-in, when only what is out of all proportion is refused, and nothing shortened.

    A gradient spike is more than 6 deviations and 10 times above what is usual; a loss spike more than 12
    deviations (small batches have long tails), the first loss and 3 times the mean above the mean; half the
    first loss will do from the second such step in a row on, since long tails of the data do not last. A
    gradient more than 3 deviations and twice above what is usual is shortened to 2 deviations above it.
    """
    finite = xp.isfinite(loss) & xp.isfinite(norm)
    one = xp.ones_like(loss)
    if seen is None:
        return Decision(xp.where(finite, one * FINE, one * NOT_FINITE), one, loss != loss)
    bounds = _EARLY if early else _USUAL
    above, rise = _log(xp, norm) - seen.mean[0], loss - seen.mean[1]
    norm_deviation, loss_deviation = _deviations(xp, seen)
    spike = (above > bounds.wild * norm_deviation) & (above > bounds.ratio)
    high = (rise > bounds.wild_loss * loss_deviation) & (rise > bounds.rise * abs(seen.mean[1]))
    high = high & (rise > _HIGH * abs(seen.first))
    jump = high & (was_high | (rise > abs(seen.first)))
    verdict = xp.where(spike, one * GRADIENT_SPIKE, xp.where(jump, one * LOSS_SPIKE, one * FINE))
    verdict = xp.where(finite, verdict, one * NOT_FINITE)
    if early:
        return Decision(verdict, one, high)
    long = finite & (above > bounds.long * norm_deviation) & (above > bounds.long_ratio)
    clip = xp.where(long, xp.exp(xp.where(long, 2.0 * norm_deviation - above, 0.0 * one)), one)
    return Decision(verdict, clip, high)


def calm_below(seen: Statistics, *, early: bool = False) -> tuple[float, float]:
    """Loss and norm up to which `judge`, on a host, finds a step fine, its loss not high, and its gradient
    not long.
    """
    bounds = _EARLY if early else _USUAL
    (log_mean, mean), first = seen.mean.tolist(), float(seen.first)
    norm_deviation, loss_deviation = _deviations_in_numbers(seen)
    above = max(bounds.long * norm_deviation, bounds.long_ratio)
    rise = max(bounds.wild_loss * loss_deviation, bounds.rise * abs(mean), _HIGH * abs(first))
    return mean + _NEARLY * rise, _NEARLY * math.exp(min(log_mean + above, 700.0))


def take_up(xp: Any, seen: Statistics, values: Any) -> Statistics:
    """The statistics with more steps: losses and norms, float64[2, n]; of those that are finite."""
    finite = xp.isfinite(values).all(0)
    num = xp.where(finite, xp.ones_like(values[0]), 0.0).sum()  # a count times a number is float32
    share, of_each = (1 - _KEEP) * num / BLOCK, (1 - _KEEP) / BLOCK
    most = _WINSOR * _deviations(xp, seen)[:, None]
    d = xp.where(finite, _watched(xp, values) - seen.mean[:, None], 0.0)
    d = xp.minimum(xp.maximum(d, -most), most)
    mean = seen.mean + of_each * d.sum(1)
    return Statistics(mean, (1 - share) * seen.var + of_each * _INFLATION * (d * d).sum(1), seen.first)


def take_up_numbers(seen: Statistics, losses: Sequence[float], norms: Sequence[float]) -> Statistics:
    """`take_up` on a host, in Python's numbers: for some dozen of them numpy's calls take longer than all
    else that the guard does.
    """
    (log_mean, mean), (log_var, var), first = seen.mean.tolist(), seen.var.tolist(), float(seen.first)
    most_log, most = (_WINSOR * deviation for deviation in _deviations_in_numbers(seen))
    num, log_sum, log_squares, total, squares = 0, 0.0, 0.0, 0.0, 0.0
    for loss, norm in zip(losses, norms, strict=True):
        if math.isfinite(loss) and math.isfinite(norm):
            num += 1
            d = math.log(norm if norm > _TINY else _TINY) - log_mean
            d = most_log if d > most_log else -most_log if d < -most_log else d
            log_sum += d
            log_squares += d * d
            d = loss - mean
            d = most if d > most else -most if d < -most else d
            total += d
            squares += d * d
    share, of_each = (1 - _KEEP) * num / BLOCK, (1 - _KEEP) / BLOCK
    spread = of_each * _INFLATION
    return Statistics(
        np.array((log_mean + of_each * log_sum, mean + of_each * total)),
        np.array(((1 - share) * log_var + spread * log_squares, (1 - share) * var + spread * squares)),
        first,
    )


def begin(xp: Any, values: Any) -> Statistics:
    """The statistics of the first steps: losses and norms, float64[2, n], of which some may not be finite.

    Without any that is, everything is usual, until `take_up` has adapted.
    """
    kept = values[:, xp.isfinite(values).all(0)]
    if not kept.shape[1]:
        return Statistics(0.0 * values[:, 0].clip(0, 0), 0.0 * values[:, 0].clip(0, 0) + 1e30, 0.0)
    watched = _watched(xp, kept)
    middle = xp.quantile(watched, 0.5, 1)
    deviation = 1.4826 * xp.quantile(abs(watched - middle[:, None]), 0.5, 1)
    return Statistics(middle, deviation * deviation, kept[0, 0])


def _watched(xp: Any, values: Any) -> Any:
    """Of losses and norms [2, n]: the logarithms of the norms, and the losses."""
    return xp.stack((_log(xp, values[1]), values[0]))


def _log(xp: Any, norm: Any) -> Any:
    """A tiny number stands for zero, and for what is no number."""
    return xp.log(xp.where(norm > _TINY, norm, _TINY))


def _deviations(xp: Any, seen: Statistics) -> Any:
    """Of the log norm and of the loss, float64[2]. The latter is not below a hundredth of the mean, so that
    a loss that stood still can move again.
    """
    least = _least_of_loss(seen.mean, seen.first)
    least[0] = _LEAST_DEVIATION
    return xp.maximum(seen.var**0.5, least)


def _deviations_in_numbers(seen: Statistics) -> tuple[float, float]:
    log_var, var = seen.var.tolist()
    least = float(_least_of_loss(seen.mean.tolist()[1], float(seen.first)))
    return max(math.sqrt(log_var), _LEAST_DEVIATION), max(math.sqrt(var), least)


def _least_of_loss(mean: Any, first: Scalar) -> Any:
    return 0.01 * abs(mean) + (0.001 * abs(first) + _TINY)
