"""The whole step as one graph: what `train_step` does, compiled, for steps in which nothing is unusual.

Forward and backward pass, gradient transforms, norm, permission, update and the numbers of the log row are
one function of tensors, which `torch.compile` turns into one kernel call. The guard says beforehand up to
which loss and norm it is certain to permit an update; a step beyond, or with a sample left out, leaves
everything as it was, and `train_step` takes it. So does the first step, which makes the optimizer's state,
and each that the guard looks at layers in. All of this depends on the step and the state alone, so a run
that is continued or replayed chooses alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from surefoot.keys import word
from surefoot.optim.functional import FunctionalUpdate, Slots, known
from surefoot.optim.gradients import global_norm
from surefoot.optim.update import FAR_FROM_OVERFLOW
from surefoot.train_step import (
    Attempt,
    Parts,
    known_weight,
    losses_and_weights,
    pieces_of,
    positive,
    probe,
    share_of,
)
from surefoot.types import Minibatch, Tree, leaves

_YES = torch.tensor(True)
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "fallback_random": True  # torch's own random numbers: the masks that eager mode draws
}


def refusal(parts: Parts) -> str:
    """Why no graph of the whole step is possible, or nothing."""
    optimizer = parts.updater.optimizer
    if parts.device.type != "cpu":
        return f"that is for CPUs so far, and this is {parts.device}"
    if not known(optimizer) or not parts.updater.well_known:
        return f"optimizer {type(optimizer).__name__} is none of torch's own, or hooked into, or has no eps"
    if parts.physical < parts.micro:
        return "compute.micro_batch splits the recipe's micro-batches"
    if any(p.is_complex() or p.is_sparse for p in parts.params):
        return "the model has complex or sparse parameters"
    return ""


class Graph:
    """Steps of one run, compiled. Built from `parts`; `refusal` says beforehand whether that is possible.

    Args:
        eager_every: steps that end at a multiple of it are left to `train_step`.
    """

    def __init__(self, parts: Parts, *, eager_every: int) -> None:
        self._parts, self._every = parts, eager_every
        self._called = _Called(parts)
        self._shapes: list[Any] = []
        self._num_rows = 0
        self._whole: Callable[..., Tensor] | None = None
        self._pieces: dict[int, Callable[..., Any]] = {}
        self._last: Callable[..., Tensor] | None = None
        self._update: FunctionalUpdate | None = None
        self._names: dict[str, Tensor] = {}
        self._others: list[Tensor] = []  # trainable, without a gradient
        self._buffers: list[str] = []
        self._bounds = torch.empty(3, dtype=torch.float64)
        self._rates = torch.empty(len(parts.base_lr), dtype=torch.float64)
        self._write_bounds, self._write_rates = self._bounds.numpy(), self._rates.numpy()

    def __call__(self, batch: Minibatch, multiplier: float) -> Attempt | None:
        """Attempts one update; None if it is one for `train_step`: nothing was changed then."""
        parts, step = self._parts, batch.slots.step
        if step == 0 or (step + 1) % self._every == 0 or batch.weights is not None:
            return None
        loss_bound, norm_bound = parts.guard.lets_pass(step)
        if loss_bound == -math.inf:
            return None
        if self._update is None:
            self._make(batch)
        if _shapes(batch.data) != self._shapes:
            return None
        rates = [lr * multiplier for lr in parts.base_lr]
        far = FAR_FROM_OVERFLOW / max(1.0, *map(abs, rates))
        self._write_bounds[:] = loss_bound, min(norm_bound, far), far
        self._write_rates[:] = rates
        row, num_micro = self._run(batch)
        loss, grad_norm, ratio, applied = row.tolist()
        if not applied:
            return None
        scale = parts.precision.scale
        permit = parts.guard.permit_on_host(loss, grad_norm, step=step, scaled=scale is not None)
        loss_scale = None
        if scale is not None:
            loss_scale = scale.scale
            scale.adjust(_YES)
        for group, rate in zip(parts.updater.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        loss, grad_norm, ratio, _ = row.unbind()
        return Attempt(loss, grad_norm, ratio, _YES, permit.verdict, permit.clip, loss_scale, num_micro)

    def _run(self, batch: Minibatch) -> tuple[Tensor, int]:
        """Loss, norm of the gradient, update ratio, and whether the update was applied: float64[4]; and the
        number of passes.
        """
        parts, update = self._parts, self._update
        assert update is not None
        slots, buffers = update.slots(), parts.buffers.live(self._buffers)
        scale = None if parts.precision.scale is None else parts.precision.scale.scale
        draws, total = word(parts.draws, batch.slots.step), known_weight(parts, batch)
        if self._whole is not None:
            torch.default_generator.manual_seed(word(draws, 0))
            row = self._whole(slots, buffers, batch.data, total, scale, self._bounds, self._rates)
            return row, 1
        assert self._last is not None
        loss, grads, num_micro, after = None, [], 0, buffers
        for piece in pieces_of(parts, batch):
            num_micro += 1
            torch.default_generator.manual_seed(word(draws, piece.micro))
            share, added, after = self._piece(piece.num_rows)(
                piece.data, piece.num_rows, after, total, scale
            )
            if loss is None:
                loss, grads = share, added
            else:
                loss = loss + share
                torch._foreach_add_(grads, added)
        row = self._last(slots, buffers, after, loss, grads, scale, self._bounds, self._rates)
        return row, num_micro

    def _make(self, batch: Minibatch) -> None:
        """Learns from an eager pass with this batch what gets a gradient and which buffers change."""
        parts = self._parts
        probe(parts, batch)
        self._names = {
            name: p for name, p in parts.model.named_parameters() if p.requires_grad and p.grad is not None
        }
        self._update = FunctionalUpdate(parts.updater.optimizer, list(self._names.values()))
        mine = {id(p) for p in self._names.values()}
        self._others = [p.detach() for p in parts.params if id(p) not in mine]
        self._buffers = list(parts.buffers.changing)
        self._shapes, self._num_rows = _shapes(batch.data), batch.num_rows
        one = parts.micro >= batch.num_rows
        self._whole = _compiled(self._whole_step) if one else None
        self._last = None if one else _compiled(self._finish)

    def _piece(self, num_rows: int) -> Callable[..., Any]:
        if num_rows not in self._pieces:
            self._pieces[num_rows] = _compiled(self._gradients)
        return self._pieces[num_rows]

    # ------------------------------------------------------------------------- below: what is compiled

    def _whole_step(
        self,
        slots: Slots,
        buffers: list[Tensor],
        data: Tree,
        total: Tensor | float | None,
        scale: Tensor | None,
        bounds: Tensor,
        rates: Tensor,
    ) -> Tensor:
        loss, grads, after = self._gradients(data, self._num_rows, buffers, total, scale)
        return self._finish(slots, buffers, after, loss, grads, scale, bounds, rates)

    def _gradients(
        self,
        data: Tree,
        num_rows: int,
        buffers: list[Tensor],
        total: Tensor | float | None,
        scale: Tensor | None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """A piece's share of the loss, and of the gradients, times the loss scale; and buffers after it."""
        parts = self._parts

        def share(values: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
            after = [b.clone() for b in buffers]
            named = {f"model.{name}": b for name, b in zip(self._buffers, after, strict=True)}
            with parts.precision.forward():
                losses, weights = functional_call(self._called, {**values, **named}, (data, num_rows))
            weight = total
            if weight is None and weights is None:
                weight = float(self._num_rows)
            elif weight is None:
                assert num_rows == self._num_rows, "weights that are known after the forward pass only"
                weight = positive(weights.sum())
            found = share_of(losses, weights, weight)
            return (found if scale is None else found * scale), (found.detach(), after)

        values = {f"model.{name}": p.detach() for name, p in self._names.items()}
        grads, (_, (loss, after)) = grad_and_value(share, has_aux=True)(values)
        return loss, list(grads.values()), after

    def _finish(
        self,
        slots: Slots,
        buffers: list[Tensor],
        after: list[Tensor],
        loss: Tensor,
        grads: list[Tensor],
        scale: Tensor | None,
        bounds: Tensor,
        rates: Tensor,
    ) -> Tensor:
        parts, update = self._parts, self._update
        assert update is not None
        params = [p.detach() for p in self._names.values()]
        if scale is not None:
            grads = [g * (1.0 / scale) for g in grads]
        norm = clipped = global_norm(grads)
        for transform in parts.transforms:
            changed = transform(grads, clipped)
            clipped = global_norm(grads) if changed is None else changed
        kept = [s for group in slots for named in group for s in named if s is not None]
        old, old_kept = [p.clone() for p in params], [s.clone() for s in kept]
        update(params, grads, slots, rates)
        moved = global_norm([p - o for p, o in zip(params, old, strict=True)])
        size = global_norm([*old, *self._others])
        applied = (loss <= bounds[0]) & (norm <= bounds[1]) & (size <= bounds[2]) & torch.isfinite(moved)
        for now, then in zip([*params, *kept], [*old, *old_kept], strict=True):
            now.copy_(torch.where(applied, now, then))
        for now, then in zip(buffers, after, strict=True):
            now.copy_(torch.where(applied, then, now))
        return torch.stack([n.double() for n in (loss, norm, moved / size, applied)])


class _Called(nn.Module):
    """The objective as a module, since parameters are exchanged in one."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.model, self._parts = parts.model, parts

    def forward(self, data: Tree, num_rows: int) -> tuple[Tensor, Tensor | None]:
        return losses_and_weights(self._parts, data, num_rows)


def _shapes(data: Tree) -> list[Any]:
    return [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves(data)]


def _compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method, compiled. It gets a code object of its own: torch keeps what it compiles there, and not
    more than eight times; a process may make more runs than that.
    """
    function, owner = method.__func__, method.__self__  # type: ignore[attr-defined]
    own = FunctionType(function.__code__.replace(), function.__globals__)
    compiled: Callable[..., Any] = torch.compile(
        MethodType(own, owner), fullgraph=True, dynamic=False, options=_OPTIONS
    )
    return compiled
