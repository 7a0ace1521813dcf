"""Detectors within a step: is this update to be applied, and at what length?

Written once, for Python floats (a CPU, where reading a number costs nothing) and for 0-d tensors (a GPU,
which must not be waited for): `FLOATS` and `TENSORS` are what differs. All arithmetic is in float64.

Statistics are running means and variances whose updates are winsorised: an outlier moves them by at most
three standard deviations, so one spike hardly counts, and a lasting change is taken up within some dozen
steps. They begin with the median and the median absolute deviation of the first `BURN_IN` steps. Of the
norm of the gradient it is the logarithm that is watched: false alarms of a test on the norm itself are
common where it is skewed (cf. ZClip, Kumar et al. 2025, and the step skipping of OLMo-core).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BURN_IN = 64
_KEEP = 0.98  # of the running statistics, per step
_INFLATION = 1.03  # makes up for the variance that winsorising takes away
_WINSOR, _WILD, _LONG = 3.0, 6.0, 3.0  # standard deviations
_RISE = 3.0
_LEAST_DEVIATION = 0.05  # of the log norm
_WILD_RATIO, _LONG_RATIO = math.log(10.0), math.log(2.0)
EARLIEST = 1
"""Steps after which a crude judgement is possible; until the end of the burn-in, with these:"""
_EARLY_WILD, _EARLY_RATIO, _EARLY_RISE = 12.0, math.log(30.0), 10.0
_TINY = 1e-30

FINE, NOT_FINITE, GRADIENT_SPIKE, LOSS_SPIKE, SAT_OUT = 0, 1, 2, 3, 4
"""Verdicts on a step. Sat out: the guard had decided before that it should be."""

Scalar = Any
"""A float or a 0-d float64 tensor."""


class Statistics(NamedTuple):
    """Running statistics: of the log of the gradient's norm, and of the loss. first: the first loss."""

    norm_mean: Scalar
    norm_var: Scalar
    loss_mean: Scalar
    loss_var: Scalar
    first: Scalar


class Decision(NamedTuple):
    """verdict: `FINE`, or why the update should be refused. clip: what its gradient is to be multiplied
    by, at most 1.
    """

    verdict: Scalar
    clip: Scalar


class Ops(NamedTuple):
    """What scalars differ in. finite: of two, whether both are. log: of a number that is not negative;
    `_TINY` stands for zero. exp: of at most zero. where: one of two. zero: one of
    the kind of its argument.
    """

    finite: Callable[..., Any]
    log: Callable[..., Any]
    sqrt: Callable[..., Any]
    exp: Callable[..., Any]
    larger: Callable[..., Any]
    where: Callable[..., Any]
    zero: Callable[..., Any]


FLOATS = Ops(
    finite=lambda a, b: math.isfinite(a) and math.isfinite(b),
    log=lambda x: math.log(x) if x > _TINY else math.log(_TINY),
    sqrt=math.sqrt,
    exp=lambda x: math.exp(min(x, 0.0)),
    larger=max,
    where=lambda condition, yes, no: yes if condition else no,
    zero=lambda like: 0.0,
)
TENSORS = Ops(
    finite=lambda a, b: torch.isfinite(a) & torch.isfinite(b),
    log=lambda x: torch.log(torch.clamp(x, min=_TINY)),
    sqrt=torch.sqrt,
    exp=lambda x: torch.exp(torch.clamp(x, max=0.0)),
    larger=lambda a, b: torch.maximum(a, torch.as_tensor(b, dtype=a.dtype, device=a.device)),
    where=torch.where,
    zero=torch.zeros_like,
)


def decide(
    ops: Ops, seen: Statistics | None, loss: Scalar, norm: Scalar, *, early: bool = False
) -> Decision:
    """The decision on a step with this loss and norm of its gradient, before clipping.

    seen: statistics of the steps before; None for the first few, when only finiteness is asked for.
    early: within the burn-in, when only what is out of all proportion is refused, and nothing shortened.

    A gradient spike is more than 6 deviations and 10 times above what is usual; a loss spike more than 6
    deviations, the first loss and 3 times the mean above the mean. A gradient more than 3
    deviations and twice above what is usual is shortened to 2 deviations above it.
    """
    finite, zero = ops.finite(loss, norm), ops.zero(loss)
    if seen is None:
        return Decision(ops.where(finite, zero + FINE, zero + NOT_FINITE), zero + 1.0)
    above = ops.log(norm) - seen.norm_mean
    deviation = ops.larger(ops.sqrt(seen.norm_var), _LEAST_DEVIATION)
    wild, ratio, most = (_EARLY_WILD, _EARLY_RATIO, _EARLY_RISE) if early else (_WILD, _WILD_RATIO, _RISE)
    rise, least = loss - seen.loss_mean, ops.larger(abs(seen.first), most * abs(seen.loss_mean))
    spike = (above > wild * deviation) & (above > ratio)
    jump = (rise > wild * _loss_deviation(ops, seen)) & (rise > least)
    verdict = ops.where(spike, zero + GRADIENT_SPIKE, ops.where(jump, zero + LOSS_SPIKE, zero))
    if early:
        return Decision(ops.where(finite, verdict, zero + NOT_FINITE), zero + 1.0)
    long = (above > _LONG * deviation) & (above > _LONG_RATIO)
    clip = ops.where(finite & long, ops.exp(2.0 * deviation - above), zero + 1.0)
    return Decision(ops.where(finite, verdict, zero + NOT_FINITE), clip)


def take_up(ops: Ops, seen: Statistics, loss: Scalar, norm: Scalar) -> Statistics:
    """The statistics with one more step, whether it was refused or not; not if it is not finite."""
    finite = ops.finite(loss, norm)
    deviations = ops.larger(ops.sqrt(seen.norm_var), _LEAST_DEVIATION), _loss_deviation(ops, seen)
    moved: list[Scalar] = []
    for value, mean, var, deviation in (
        (ops.log(norm), seen.norm_mean, seen.norm_var, deviations[0]),
        (loss, seen.loss_mean, seen.loss_var, deviations[1]),
    ):
        most = _WINSOR * deviation
        d = ops.where(value - mean > most, most, ops.where(value - mean < -most, -most, value - mean))
        moved.append(ops.where(finite, mean + (1 - _KEEP) * d, mean))
        moved.append(ops.where(finite, _KEEP * var + (1 - _KEEP) * _INFLATION * d * d, var))
    return Statistics(moved[0], moved[1], moved[2], moved[3], seen.first)


def _loss_deviation(ops: Ops, seen: Statistics) -> Scalar:
    """Not below a hundredth of the mean, so that a loss that stood still can move again."""
    least = ops.larger(0.01 * abs(seen.loss_mean), 0.001 * abs(seen.first) + _TINY)
    return ops.larger(ops.sqrt(seen.loss_var), least)


def begin(losses: Tensor, norms: Tensor) -> Statistics:
    """The statistics after the burn-in: float64[n] each, of which some may not be finite.

    Without any that is, everything is usual, until `take_up` has adapted.
    """
    finite = torch.isfinite(losses) & torch.isfinite(norms)
    logs = torch.log(torch.clamp(norms, min=_TINY))
    found: list[Scalar] = []
    for values in (logs, losses):
        values = torch.where(finite, values, torch.nan)
        median = torch.nanmedian(values)
        deviation = 1.4826 * torch.nanmedian((values - median).abs())
        found += [torch.nan_to_num(median), torch.nan_to_num(deviation * deviation, nan=1e30)]
    first = losses[torch.argmax(finite.to(torch.uint8))]
    return Statistics(found[0], found[1], found[2], found[3], torch.nan_to_num(first))


def on_host(seen: Sequence[Scalar]) -> Statistics:
    """As Python floats."""
    return Statistics(*(float(value) for value in seen))
