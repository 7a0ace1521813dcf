"""Detectors within a step: is this update to be applied, and at what length?

Written once, for a host and for a device that must not be waited for: `xp` is the arithmetic of either, see
`surefoot.guard.arithmetic`. All of it is in float64.

Statistics are running means and variances, taken up in blocks of `BLOCK` steps; after the first `YOUNG`
blocks `LAG` steps late, so that what follows can be worked out while steps go on. They are winsorised: an
outlier counts as six standard deviations, so one spike hardly moves them, and a lasting change is taken up
within some hundred steps. They begin with the median and the median absolute deviation of the first
`BURN_IN` steps. Of the norm of the gradient it is the logarithm that is watched: false alarms of a test on
the norm itself are common where it is skewed (cf. ZClip, Kumar et al. 2025).
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

BURN_IN = 64
BLOCK, LAG, YOUNG = 32, 16, 32
EARLIEST = 1
"""Steps after which a crude judgement is possible."""
FINE, NOT_FINITE, GRADIENT_SPIKE, LOSS_SPIKE, SAT_OUT, STATISTICS_SPIKE = range(6)
"""Verdicts on a step. Sat out: the guard had decided before that it should be. Statistics spike: see
`MOST_GROWTH`.
"""
ANY_GROWTH = sys.float_info.max
"""That is finite."""
MOST_GROWTH = 4.0
"""By what running statistics may grow in a step (`surefoot.optim.statistics.growth`). Each batch is
normalised by its own, so what ruins them need not show in the loss or in the gradient.
"""

_EACH = (1 - 0.98**BLOCK) / BLOCK  # what a step counts for in the running statistics
_SPREAD = 1.03 * _EACH  # in the variance, which winsorising makes smaller
_WINSOR = 6.0  # standard deviations
_LEAST_DEVIATION = 0.05  # of the log norm
_HIGH = 0.5  # of the first loss
_AS_BEFORE = 1.25  # of the height of a loss that was no spike
_TINY = 1e-30

Scalar = Any
"""A float or a 0-d float64 tensor."""


class Statistics(NamedTuple):
    """Running means and variances, of the log of the gradient's norm and of the loss. first: the first
    loss. height: how far above the mean the highest was that stood out and was no spike.
    """

    log_mean: Scalar
    log_var: Scalar
    mean: Scalar
    var: Scalar
    first: Scalar
    height: Scalar


class Decision(NamedTuple):
    """verdict: `FINE`, or why the update should be refused. clip: what its gradient is to be multiplied
    by, at most 1. high: whether the loss is so high that it is a spike if the next one is, too.
    """

    verdict: Scalar
    clip: Scalar
    high: Scalar


class Limits(NamedTuple):
    """What a step's loss and norm are compared with, until the statistics change.

    spike: a longer gradient is one. long: a longer one is shortened to `short`. high, jump: a loss above
    the first is a spike if the one before was above it, too; a loss above both is one at once.
    norm_deviation, loss_deviation: of the log norm and of the loss. rise: above the mean, up to which no
    loss is a spike, whatever this run had before.
    """

    spike: Scalar
    long: Scalar
    short: Scalar
    high: Scalar
    jump: Scalar
    norm_deviation: Scalar
    loss_deviation: Scalar
    rise: Scalar


class _Bounds(NamedTuple):
    wild: float
    ratio: float
    wild_loss: float
    rise: float
    long: float
    long_ratio: float


_USUAL = _Bounds(6.0, math.log(10.0), wild_loss=12.0, rise=3.0, long=3.0, long_ratio=math.log(2.0))
_EARLY = _Bounds(12.0, math.log(30.0), wild_loss=12.0, rise=30.0, long=12.0, long_ratio=math.log(30.0))
_MOST_LOG = 700.0  # whose exponential is finite


def limits(xp: Any, seen: Statistics, *, early: bool = False) -> Limits:
    """The limits for the next steps. early: within the burn-in.

    A gradient spike is more than 6 deviations and 10 times above what is usual; a loss spike more than 12
    deviations (small batches have long tails), the first loss and 3 times the mean above the mean; half the
    first loss will do from the second such step in a row on, since long tails of the data do not last. A
    loss that is at most a quarter further above the mean than one that stood out and was none is no spike
    either: this is what the data are like. A gradient more than 3 deviations and twice above what is usual
    is shortened to 2 deviations above it.
    """
    bounds = _EARLY if early else _USUAL
    norm_deviation, loss_deviation = _deviations(xp, seen)
    first = abs(seen.first)

    def norm(above: Scalar) -> Scalar:
        return xp.exp(xp.minimum(seen.log_mean + above, xp.number(_MOST_LOG)))

    rise = xp.maximum(bounds.wild_loss * loss_deviation, bounds.rise * abs(seen.mean))
    rise = xp.maximum(rise, _HIGH * first)
    return Limits(
        spike=norm(xp.maximum(bounds.wild * norm_deviation, xp.number(bounds.ratio))),
        long=norm(xp.maximum(bounds.long * norm_deviation, xp.number(bounds.long_ratio))),
        short=norm(2.0 * norm_deviation),
        high=seen.mean + xp.maximum(rise, _AS_BEFORE * seen.height),
        jump=seen.mean + first,
        norm_deviation=norm_deviation,
        loss_deviation=loss_deviation,
        rise=rise,
    )


def judge(
    xp: Any, allowed: Limits | None, loss: Scalar, norm: Scalar, *, was_high: Scalar, early: bool = False
) -> Decision:
    """The decision on a step with this loss and norm of its gradient, before clipping.

    allowed: None for the first, when only finiteness is asked for.
    was_high: of the decision on the step before.
    early: within the burn-in, when only what is out of all proportion is refused, and nothing shortened.
    """
    finite = xp.isfinite(loss) & xp.isfinite(norm)
    one = xp.number(1.0)
    if allowed is None:
        return Decision(xp.where(finite, one * FINE, one * NOT_FINITE), one, loss < loss)
    high = loss > allowed.high
    jump = high & (was_high | (loss > allowed.jump))
    verdict = xp.where(
        norm > allowed.spike, one * GRADIENT_SPIKE, xp.where(jump, one * LOSS_SPIKE, one * FINE)
    )
    verdict = xp.where(finite, verdict, one * NOT_FINITE)
    if early:
        return Decision(verdict, one, high)
    shorter = allowed.short / xp.maximum(norm, allowed.long)  # which is above zero
    return Decision(verdict, xp.where(finite & (norm > allowed.long), shorter, one), high)


def calm_below(allowed: Limits) -> tuple[float, float]:
    """Loss and norm up to which `judge`, on a host, finds a step fine, its loss not high, and its gradient
    not long.
    """
    return min(allowed.high, sys.float_info.max), allowed.long  # an infinite loss is never fine


def take_up(xp: Any, seen: Statistics, allowed: Limits, losses: Any, norms: Any) -> Statistics:
    """The statistics with a block more of steps, by the limits until now; those count whose numbers are
    finite.
    """
    finite, loss_outlier = xp.finite(losses, norms), _WINSOR * allowed.loss_deviation
    logs = xp.logs(norms, _TINY)
    log_sum, log_squares = xp.winsorised(logs, finite, seen.log_mean, _WINSOR * allowed.norm_deviation)
    total, squares = xp.winsorised(losses, finite, seen.mean, loss_outlier)
    most = seen.mean + allowed.rise  # or each block could add a quarter
    height = xp.highest(losses, norms, finite, most, allowed.spike) - seen.mean
    stands_out = height > loss_outlier
    keep = 1 - _EACH * xp.count(finite)
    return Statistics(
        seen.log_mean + _EACH * log_sum,
        keep * seen.log_var + _SPREAD * log_squares,
        seen.mean + _EACH * total,
        keep * seen.var + _SPREAD * squares,
        seen.first,
        xp.where(stands_out, xp.maximum(seen.height, height), seen.height),
    )


def begin(xp: Any, losses: Any, norms: Any) -> Statistics:
    """The statistics of the first steps, of which those count whose numbers are finite.

    Without any that is, nearly everything is usual, until `take_up` has adapted.
    """
    finite = xp.finite(losses, norms)
    some = xp.count(finite) > 0

    def found(value: Scalar, without: float) -> Scalar:
        return xp.where(some, value, without)

    log_mean, log_var = _centre(xp, xp.logs(norms, _TINY), finite)
    mean, var = _centre(xp, losses, finite)
    return Statistics(
        found(log_mean, 0.0),
        found(log_var, 1e30),
        found(mean, 0.0),
        found(var, 1e30),
        found(xp.first(losses, finite), 0.0),
        xp.number(0.0),
    )


def _centre(xp: Any, values: Any, those: Any) -> tuple[Scalar, Scalar]:
    """Median of some of the values, and their variance by the median absolute deviation."""
    middle = xp.median(values, those)
    deviation = 1.4826 * xp.median(xp.distances(values, middle), those)
    return middle, deviation * deviation


def _deviations(xp: Any, seen: Statistics) -> tuple[Scalar, Scalar]:
    """Of the log norm and of the loss. The latter is not below a hundredth of the mean, so that a loss that
    stood still can move again.
    """
    least = 0.01 * abs(seen.mean) + (0.001 * abs(seen.first) + _TINY)
    of_log = xp.maximum(xp.sqrt(seen.log_var), xp.number(_LEAST_DEVIATION))
    return of_log, xp.maximum(xp.sqrt(seen.var), least)
