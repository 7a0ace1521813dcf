"""Blame: which samples broke a step that was refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surefoot.data.holes import leave_out
from surefoot.guard.detect import MOST_GROWTH, STATISTICS_SPIKE
from surefoot.optim.statistics import ENOUGH_ROWS, worst
from surefoot.passes import Probe, losses_of, probe, seen_of
from surefoot.train_step import Parts
from surefoot.types import HOLE, Minibatch, leaves, take_rows

_MOST = 8
"""To blame in one step; with more it is the step itself that is wrong."""
_OUTLIER = 10.0
_ENOUGH = 16
"""Samples: of fewer one that is common often seems to stand out."""


class Blame(NamedTuple):
    """ids: of the samples. broken_data: their data hold what is not finite, so it is not the weights.
    growth: of the running statistics of `layer`, if it is for them that the step was refused. by_nature:
    that layer sees nothing but such samples.
    """

    ids: tuple[int, ...]
    broken_data: bool = False
    growth: float = 1.0
    layer: str = ""
    by_nature: bool = False


def to_blame(parts: Parts, batch: Minibatch, verdict: int) -> Blame:
    """Samples without which the step that was refused would have been permitted; none if it is not for a
    few samples.
    """
    blamed = _blamed(parts, batch, verdict)
    ids = blamed.ids
    if not ids:
        return blamed
    rows = torch.from_numpy(np.flatnonzero(np.isin(batch.slots.ids, ids)))
    broken = torch.zeros(len(rows), dtype=torch.bool)
    for leaf in leaves(batch.data):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            finite = torch.isfinite(leaf[rows.to(leaf.device)]).reshape(len(rows), -1).all(1)
            broken |= ~finite.cpu()
    return blamed._replace(broken_data=bool(broken.all()))


def _blamed(parts: Parts, batch: Minibatch, verdict: int) -> Blame:
    losses = losses_of(parts, batch)
    broken, found = _ids(batch, ~torch.isfinite(losses)), probe(parts, batch)
    everyone = _ids(batch, torch.ones_like(losses, dtype=torch.bool))
    if broken or not math.isfinite(found.grad_norm):
        return Blame(_breaking(parts, batch, broken or everyone, lambda p: all(map(math.isfinite, p[:2]))))
    most = parts.guard.most_growth(batch.slots.step)
    if found.growth <= most and verdict == STATISTICS_SPIKE:  # by now they are otherwise
        return Blame(())
    if found.growth <= most:
        return Blame(_outweighing(parts, batch, losses))
    place = worst(found.growths)
    blamed = Blame((), growth=found.growth, layer=parts.buffers.layer(place))
    ids = _breaking(parts, batch, everyone, lambda p: p.growth <= most)
    if not ids:
        return blamed
    left = probe(parts, leave_out(batch, np.isin(batch.slots.ids, ids))).growths[place]
    return blamed._replace(ids=ids) if left.sees else blamed._replace(by_nature=True)


def _breaking(
    parts: Parts, batch: Minibatch, suspects: tuple[int, ...], is_sound: Callable[[Probe], bool]
) -> tuple[int, ...]:
    """Those of the suspects that break a step even alone, by bisection. (A sample's own loss does not
    tell: batch norm carries what is not finite to its neighbours, and hides what is too large.)
    """
    groups = [suspects]
    while any(len(group) > 1 for group in groups):
        halves = [half for g in groups for half in (g[: len(g) // 2], g[len(g) // 2 :]) if half]
        groups = []
        for half in halves:
            others = np.isin(batch.slots.ids, list(set(suspects) - set(half)))
            if not is_sound(probe(parts, leave_out(batch, others))):
                groups.append(half)
            if len(groups) > _MOST:  # not a few samples: the step itself
                return ()
    found = tuple(sorted(i for group in groups for i in group))
    return found if found and _without(parts, batch, found) else ()


def unlike_others(parts: Parts, batch: Minibatch) -> Blame:
    """Samples of a batch before which nothing is known, each of which would make running statistics of the
    others grow as no later step may (`MOST_GROWTH`). `growth`, `layer`: of what a batch norm sees in the
    whole batch, by all of them.

    Groups of the batch are compared with the one of least variance, and parts of those that stand out with
    that one, too; then what is left is the measure of each that does. Whatever a pass is made with fills
    the batch, since a model may take no other size. Few rows do not tell what is rare from what is wrong.
    """
    rows = np.flatnonzero(batch.slots.ids != HOLE)
    if not parts.buffers.statistics or len(rows) < ENOUGH_ROWS:
        return Blame(())

    def look(those: NDArray[np.intp]) -> NDArray[np.float64]:
        data = take_rows(batch.data, np.resize(those, batch.num_rows), batch.num_rows)
        seen, part[:] = zip(*seen_of(parts, batch._replace(data=data, weights=None)), strict=True)
        found: NDArray[np.float64] = np.nan_to_num(np.array(seen), nan=np.inf, posinf=np.inf)
        return found

    def factors(found: NDArray[np.float64], usual: NDArray[np.float64]) -> NDArray[np.float64]:
        counts = (usual > 0) & np.isfinite(usual)
        with np.errstate(over="ignore"):
            return np.divide(found, usual, out=np.ones_like(found), where=counts)

    def far(found: NDArray[np.float64], usual: NDArray[np.float64]) -> bool:
        """Whether running statistics that are as usual would grow too far."""
        return bool(((factors(found, usual) - 1.0) * part > MOST_GROWTH - 1.0).any())

    part: list[float] = []
    groups = np.array_split(rows, _MOST)
    of_groups = [look(group) for group in groups]
    least = np.min(of_groups, axis=0)
    place = int(np.argmin([factors(found, least).max() for found in of_groups]))
    others, usual = groups[place], of_groups[place]
    suspects = [group for group, found in zip(groups, of_groups, strict=True) if far(found, usual)]
    few = list[int]()
    while suspects:
        halves = [half for group in suspects for half in np.array_split(group, 2) if len(half)]
        suspects = [half for half in halves if far(look(np.append(others, half)), usual)]
        few += [int(group[0]) for group in suspects if len(group) == 1]
        suspects = [group for group in suspects if len(group) > 1]
        if len(suspects) + len(few) > _MOST:
            return Blame(())
    if not few:
        return Blame(())
    left = np.setdiff1d(rows, few)
    usual = look(left)
    few = [row for row in few if far(look(np.append(left, row)), usual)]
    if not few:
        return Blame(())
    grown = factors(look(rows), usual)
    place = int(np.argmax(grown))
    ids = tuple(sorted(int(i) for i in batch.slots.ids[few]))
    return Blame(ids, growth=float(grown[place]), layer=parts.buffers.layer(place))


def _outweighing(parts: Parts, batch: Minibatch, losses: Tensor) -> tuple[int, ...]:
    """As few as possible of the samples whose losses stand out, those that do most first."""
    wild = set(outliers(batch, losses))
    order = torch.argsort(losses, descending=True).tolist()
    ranked = [i for i in (int(batch.slots.ids[row]) for row in order) if i in wild]
    ranked = ranked[: len(order) // 4]
    if not ranked or not _without(parts, batch, tuple(ranked)):
        return ()
    low, high = 0, len(ranked)
    while high - low > 1:
        middle = (low + high) // 2
        if _without(parts, batch, tuple(ranked[:middle])):
            high = middle
        else:
            low = middle
    return tuple(sorted(ranked[:high]))


def _without(parts: Parts, batch: Minibatch, ids: tuple[int, ...]) -> bool:
    """Whether a step without these samples would be permitted."""
    left = leave_out(batch, np.isin(batch.slots.ids, ids))
    if not left.slots.num_samples:
        return False
    found, step = probe(parts, left), batch.slots.step
    return parts.guard.would_permit(found.loss, found.grad_norm, found.growth, step=step)


def outliers(batch: Minibatch, losses: Tensor) -> tuple[int, ...]:
    """Samples whose loss is far above the others' of their batch, or not finite."""
    real = torch.from_numpy(batch.slots.ids != HOLE).to(losses.device)
    finite = torch.isfinite(losses) & real
    if not bool(finite.any()):
        return _ids(batch, real)
    median = losses[finite].median()
    spread = 1.4826 * (losses[finite] - median).abs().median()
    wild = (losses - median > _OUTLIER * spread) & (losses > 4.0 * median.abs())
    return _ids(batch, (wild | ~torch.isfinite(losses)) & real)


def usual_loss(batch: Minibatch, losses: Tensor) -> float:
    """The mean loss of the samples that do not stand out; NaN if there are too few to tell, or if so many
    stand out that it is nothing unusual. Losses that are no numbers do not count.
    """
    finite = torch.isfinite(losses) & torch.from_numpy(batch.slots.ids != HOLE).to(losses.device)
    out = torch.from_numpy(np.isin(batch.slots.ids, outliers(batch, losses))).to(losses.device)
    usual = losses[finite & ~out]
    if len(usual) < _ENOUGH or int((finite & out).sum()) > len(losses) // 8:
        return math.nan
    return usual.double().mean().item()


def _ids(batch: Minibatch, which: Tensor) -> tuple[int, ...]:
    chosen = batch.slots.ids[which.cpu().numpy()]
    return tuple(int(i) for i in chosen if i != HOLE)
