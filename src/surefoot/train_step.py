"""One update: tensors in, tensors out.

Read after `types`; `train` calls `train_step` once per update. A batch of B samples is split into
logical micro-batches (the recipe's, each with its own dropout), and these, if operations say so, into
physical ones. The loss of the batch is sum(losses x weights) / sum(weights) over all of them, so every
split has the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from surefoot.draws import Generators
from surefoot.errors import OperationsError, RecipeError
from surefoot.guard.detect import Decision
from surefoot.guard.watch import Watch
from surefoot.keys import seed_of
from surefoot.measure.profile import phase
from surefoot.measure.readings import RowNumbers
from surefoot.optim.buffers import Buffers
from surefoot.optim.gradients import global_norm, norms_of
from surefoot.optim.places import Places
from surefoot.optim.precision import Precision
from surefoot.optim.update import Updater
from surefoot.parallel.device import Kernels
from surefoot.protocols import GradientTransform, Objective, Strategy
from surefoot.types import Minibatch, Tree, take_rows

_T = TypeVar("_T")
_is_sparse = attrgetter("is_sparse")


@dataclass(frozen=True)
class Parts:
    """What a step is made of.

    weigh: the objective's, if it has one. params: trainable, in the model's order. base_lr: of each
    parameter group. draws: key of the random numbers of forward passes, drawn from `generators`.
    micro: rows of a logical micro-batch. physical: rows that go through the model at once, at most `micro`.
    """

    model: nn.Module
    objective: Objective
    weigh: Callable[[Tree], Tensor | None] | None
    params: Sequence[nn.Parameter]
    places: Places
    buffers: Buffers
    transforms: Sequence[GradientTransform]
    guard: Watch
    updater: Updater
    base_lr: list[float]
    precision: Precision
    strategy: Strategy
    device: torch.device
    draws: int
    generators: Generators
    micro: int
    physical: int
    kernels: Kernels


class Attempt(NamedTuple):
    """Numbers of one attempted update, see `Outcome`: 0-d tensors, or floats where the host has them.
    verdict, clip: of the guard. trained, norms: the parameters that got a gradient, and its 2-norms before
    clipping, 1-d. packed: `numbers` in one tensor, if they are.
    """

    loss: Tensor
    grad_norm: Tensor
    update_ratio: Tensor | float
    permitted: Tensor
    verdict: float | Tensor
    clip: float | Tensor
    loss_scale: Tensor | None
    num_micro: int
    trained: Sequence[nn.Parameter]
    norms: Tensor
    packed: Tensor | None = None

    def numbers(self) -> RowNumbers:
        """Those of its row that the device makes, in this order."""
        if self.packed is not None:
            return self.packed
        own = (self.loss, self.grad_norm, self.update_ratio, self.permitted, self.verdict, self.clip)
        return own if self.loss_scale is None else (*own, self.loss_scale)


class Inside(NamedTuple):
    """What a step asks that is being captured, to be launched as another: `Watch.permit_by`'s decision, the
    growth of running statistics that is permitted in each such step, and the random numbers of a logical
    micro-batch.
    """

    decide: Callable[[Tensor, Tensor], Decision]
    most_growth: float
    begin_micro: Callable[[int], None]


def train_step(
    parts: Parts,
    batch: Minibatch,
    multiplier: float,
    *,
    each: list[Tensor] | None = None,
    inside: Inside | None = None,
) -> Attempt:
    """Attempts one update at `multiplier` times the base rates. The samples' losses are added to `each`.

    Raises:
        RecipeError: the objective returned something else than one loss per sample.
    """
    parts.buffers.remember()
    loss, trained, grads, num_micro = gradients(parts, batch, each, inside)
    scale = parts.precision.scale
    norms = norms_of(grads)
    grad_norm = norm = torch.linalg.vector_norm(norms)
    step = batch.slots.step
    with phase("permit and clip"):
        on_host = parts.device.type == "cpu"
        growth = parts.buffers.growth(on_host=on_host) if parts.guard.on else None
        if inside is None:
            permit = parts.guard.permit(loss, grad_norm, growth, step=step, scaled=scale is not None)
        else:
            permit = parts.guard.permit_by(
                inside.decide, loss, grad_norm, growth, most=inside.most_growth, scaled=scale is not None
            )
        permitted, verdict, clip = permit
        if isinstance(clip, Tensor) or clip < 1.0:
            torch._foreach_mul_(grads, clip)
            norm = (norm * clip).to(norm.dtype)
        for transform in parts.transforms:
            changed = transform(grads, norm)
            norm = global_norm(grads) if changed is None else changed

    with phase("update"):
        ratio, applied = parts.updater.apply(
            permitted,
            step=step,
            multiplier=multiplier,
            base=parts.base_lr,
            grad_norm=norm,
            heals=parts.guard.heals,
        )
    parts.buffers.settle(applied, on_host=on_host)
    loss_scale = None
    if scale is not None:
        loss_scale = scale.scale.clone()
        scale.adjust(torch.isfinite(loss) & torch.isfinite(grad_norm))
    return Attempt(
        loss, grad_norm, ratio, applied, verdict, clip, loss_scale, num_micro, trained, norms
    )  # fmt: skip


def gradients(
    parts: Parts, batch: Minibatch, each: list[Tensor] | None = None, inside: Inside | None = None
) -> tuple[Tensor, list[nn.Parameter], list[Tensor], int]:
    """The loss of the batch, the parameters that get a gradient, these, and the number of passes."""

    def passes() -> tuple[Tensor, int]:
        if each is not None:
            each.clear()
        for param in parts.params:
            param.grad = None
        return accumulate(parts, batch, each, inside)

    loss, num_micro = repeatable(parts, batch, passes, captured=inside is not None)
    found = [param.grad for param in parts.params]
    grads, trained = [grad for grad in found if grad is not None], list(parts.params)
    if len(grads) < len(found):
        missed = [param for param, grad in zip(parts.params, found, strict=True) if grad is None]
        if parts.places.put_back(missed):
            found = [param.grad for param in parts.params]
            grads = [grad for grad in found if grad is not None]
        trained = [param for param, grad in zip(trained, found, strict=True) if grad is not None]
    if not grads:
        raise RecipeError(
            "no parameter got a gradient.",
            why="The losses do not depend on the model.",
            fix="Look for detach(), no_grad() or argmax() between the model and the losses.",
        )
    if any(map(_is_sparse, grads)):  # of which torch has no norm
        for param, grad in zip(trained, grads, strict=True):
            param.grad = grad.to_dense()
        grads = [param.grad for param in trained if param.grad is not None]
    parts.strategy.reduce_gradients(grads)
    if parts.precision.scale is not None:
        parts.precision.scale.unscale(grads)
    return loss, trained, grads, num_micro


def repeatable(parts: Parts, batch: Minibatch, passes: Callable[[], _T], *, captured: bool = False) -> _T:
    """What passes return, by kernels that repeat; where an operation has none, taken again by any, but for
    passes that are being captured: they leave what they have begun in the graph.
    """
    kernels = parts.kernels
    if not kernels.strict:
        return passes()
    try:
        with kernels.that_repeat():
            return passes()
    except RuntimeError as error:
        if not kernels.refused(error, step=batch.slots.step) or captured:
            raise
    undo(parts, whole=False)
    parts.buffers.remember()
    return passes()


def undo(parts: Parts, *, whole: bool) -> None:
    """Undoes what passes did to buffers since `Buffers.remember`. whole: none of them was cut short."""
    no = torch.tensor(False, device=parts.device)
    parts.buffers.settle(no, on_host=no.is_cpu, whole=whole)


def accumulate(
    parts: Parts, batch: Minibatch, each: list[Tensor] | None = None, inside: Inside | None = None
) -> tuple[Tensor, int]:
    """Adds up the gradient of the batch's loss; returns the loss (0-d) and the number of passes. The
    samples' losses, float[B] in all and NaN where they weigh nothing, are added to `each`.

    The batch's weight is known before the first backward pass if the objective can `weigh` or gives
    no weights; else sums are accumulated first and divided by it at the end.
    """
    total = known_weight(parts, batch)
    pieces = list(pieces_of(parts, batch))
    loss_sum = weight_sum = before = None
    for piece in pieces:
        if piece.begins_micro:
            if inside is None:
                parts.generators.seed(seed_of(parts.draws, batch.slots.step, piece.micro))
            else:
                inside.begin_micro(piece.micro)
            before = torch.default_generator.get_state() if parts.physical < parts.micro else None
        with phase("forward"), parts.precision.forward(), parts.precision.attention():
            losses, weights = losses_and_weights(parts, piece.data, piece.num_rows, piece.weights)
        if each is not None:  # a copy: a backward pass may reuse their memory
            found = losses.detach().clone()
            each.append(found if weights is None else torch.where(weights > 0, found, torch.nan))
        if before is not None:
            _refuse_draws(parts, before)
        if total is None and (weights is None or len(pieces) == 1):
            total = batch_weight(parts, batch, weights)
        scale = parts.precision.scale
        with phase("backward"), parts.precision.attention():  # what is checkpointed is computed again
            share = _backward(losses, weights, total, None if scale is None else scale.scale)
        loss_sum = share if loss_sum is None else loss_sum + share
        if total is None and weights is not None:
            added = weights.sum()
            weight_sum = added if weight_sum is None else weight_sum + added
    assert loss_sum is not None
    loss = parts.strategy.sum(loss_sum)
    if weight_sum is not None:
        late = positive(parts.strategy.sum(weight_sum))
        parts.places.put_back([param for param in parts.params if param.grad is None])
        grads = [param.grad for param in parts.params if param.grad is not None]
        torch._foreach_div_(grads, late)
        loss = loss / late
    return loss, len(pieces)


def _backward(
    losses: Tensor, weights: Tensor | None, total: Tensor | float | None, scale: Tensor | None
) -> Tensor:
    """The backward pass of `share_of`; what that gives, without a graph."""
    if _is_mean(losses, weights, total) and type(losses) is Tensor:
        loss = torch.mean(losses.detach())  # before it: a backward pass may reuse its memory
        each = torch.full_like(losses, 1.0 / losses.numel())
        if scale is not None:
            each = each * scale
        # As `share.backward()` would, with an operation less, and without the looking around of
        # `Tensor.backward`, which takes as long as a small layer.
        Variable._execution_engine.run_backward(
            (losses,), (each,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        return loss
    share = share_of(losses, weights, total)
    (share if scale is None else share * scale).backward()  # type: ignore[no-untyped-call]
    return share.detach()


def _is_mean(losses: Tensor, weights: Tensor | None, total: Tensor | float | None) -> bool:
    return weights is None and isinstance(total, float) and total == losses.numel()


def share_of(losses: Tensor, weights: Tensor | None, total: Tensor | float | None) -> Tensor:
    """What a piece adds to the loss of its batch, of the weight `total`: 0-d. Without that, a sum."""
    if _is_mean(losses, weights, total):  # the same bits
        return losses.mean()
    weighted = losses.sum() if weights is None else (losses * weights).sum()
    return weighted if total is None else weighted / total


class Piece(NamedTuple):
    """Rows that go through the model at once. micro: number of their logical micro-batch."""

    data: Tree
    weights: Tensor | None
    num_rows: int
    micro: int
    begins_micro: bool


def pieces_of(parts: Parts, batch: Minibatch) -> Iterator[Piece]:
    """The physical micro-batches of a batch."""
    share = parts.strategy.share(batch.num_rows)
    if share.stop - share.start == batch.num_rows <= parts.physical:  # nearly always
        yield Piece(batch.data, batch.weights, batch.num_rows, 0, True)
        return
    for micro, start in enumerate(range(share.start, share.stop, parts.micro)):
        stop = min(start + parts.micro, share.stop)
        for begin in range(start, stop, parts.physical):
            end = min(begin + parts.physical, stop)
            rows = slice(begin, end)
            yield Piece(
                take_rows(batch.data, rows, batch.num_rows),
                None if batch.weights is None else batch.weights[rows],
                end - begin,
                micro,
                begin == start,
            )


def losses_and_weights(
    parts: Parts, data: Tree, num_rows: int, slot_weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Losses of some rows, and weights where not all are 1."""
    result = parts.objective(parts.model, data)
    losses, weights = result if isinstance(result, tuple) else (result, None)
    for what, values in (("losses", losses), ("weights", weights)):
        if values is None and what == "weights":
            continue
        if not isinstance(values, Tensor) or values.shape != (num_rows,):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise RecipeError(
                f"objective returned {what} of shape {got} for a micro-batch of {num_rows}.",
                why="Losses are per sample; surefoot weighs and averages them.",
                fix=f"Return shape ({num_rows},): reduction='none', then the mean over all "
                "dimensions but the first.",
            )
    if not losses.is_floating_point() or not losses.requires_grad:
        raise RecipeError(
            f"objective returned losses ({losses.dtype}) that have no gradient.",
            why="They must be floating-point numbers that depend on the model's parameters.",
            fix="Look for detach(), no_grad() or argmax() between the model and the losses.",
        )
    if losses.dtype in (torch.float16, torch.bfloat16):
        losses = losses.float()
    if weights is not None:
        weights = weights.detach()
    if slot_weights is not None:
        weights = slot_weights if weights is None else weights * slot_weights
    return losses, weights


def _refuse_draws(parts: Parts, before: Tensor) -> None:
    """Random numbers of a forward pass are drawn for a whole logical micro-batch."""
    moved = not torch.equal(torch.default_generator.get_state(), before)
    if parts.device.type == "cuda":
        moved |= torch.cuda.default_generators[parts.device.index or 0].get_offset() > 0
    if not moved:
        return
    raise OperationsError(
        f"compute.micro_batch = {parts.physical} would split the recipe's micro-batch of {parts.micro}.",
        why="The model draws random numbers, so the split would change what is learned.",
        fix=f"Set batch.micro = {parts.physical} in the recipe, or leave compute.micro_batch out.",
    )


def known_weight(parts: Parts, batch: Minibatch) -> Tensor | float | None:
    """The weight of the whole batch, if the objective tells it beforehand."""
    if parts.weigh is None:
        return None
    weights = parts.weigh(batch.data)
    if weights is not None and batch.weights is not None:
        weights = weights * batch.weights
    return batch_weight(parts, batch, weights)


def batch_weight(parts: Parts, batch: Minibatch, weights: Tensor | None) -> Tensor | float:
    """Sum of weights over the whole batch and all processes; the number of samples if None."""
    if weights is None:
        return float(batch.slots.num_samples)
    return positive(parts.strategy.sum(weights.sum()))


def positive(weight: Tensor) -> Tensor:
    """1 for a batch in which nothing counts: its loss and gradient are then zero, not NaN."""
    return torch.where(weight > 0, weight, 1)
