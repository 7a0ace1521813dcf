"""The whole step as one graph: what `train_step` does, compiled, for steps in which nothing is unusual.

Forward and backward pass, gradient transforms, norm, permission, update and the numbers of the log row are
one function of tensors. The guard says beforehand up to which loss and norm it is certain to permit an
update; a step beyond, or with a sample left out, leaves everything as it was, and `train_step` takes it. It
takes the first step, too, which makes the optimizer's state, and those after which layers are looked at.
All of this depends on the step and the state alone, so a run that is continued or replayed chooses alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from surefoot.compiled import ChangedError, Compiled, Unchanged
from surefoot.keys import word
from surefoot.optim.functional import FunctionalUpdate, Slots
from surefoot.optim.gradients import global_norm
from surefoot.optim.update import FAR_FROM_OVERFLOW
from surefoot.train_step import (
    Attempt,
    Parts,
    known_weight,
    losses_and_weights,
    pieces_of,
    positive,
    share_of,
)
from surefoot.types import Minibatch, Tree, leaves

_YES = torch.tensor(True)
CHECK_EVERY = 100


class Graph:
    """Steps of one run, compiled; see `surefoot.choice` for whether that is possible.

    Args:
        batch: as all others will be. An eager pass with it is just done, so that it is known what gets a
            gradient and which buffers change.
        eager_every: steps that end at a multiple of it are left to `train_step`.
        cpp_wrapper: see `Compiled`.

    check_every: steps that are multiples of it check all that the trace depended on. suspects: the next
    does; to be set after code of others has run.
    """

    check_every = CHECK_EVERY

    def __init__(self, parts: Parts, batch: Minibatch, *, eager_every: int, cpp_wrapper: bool) -> None:
        self._parts, self._every = parts, eager_every
        named = {name: p for name, p in parts.model.named_parameters() if p.requires_grad}
        trained = {name: p for name, p in named.items() if p.grad is not None}
        self._names, self._params = list(trained), [p.detach() for p in trained.values()]
        self._others = [p.detach() for name, p in named.items() if name not in trained]
        self._update = FunctionalUpdate(parts.updater.optimizer, list(trained.values()))
        self._buffers = list(parts.buffers.changing)
        self._shapes, self._num_rows = _shapes(leaves(batch.data)), batch.num_rows
        self._called = _Called(parts)
        self._unchanged = Unchanged(parts.model, [parts.objective, *parts.transforms])
        self._weighs = isinstance(known_weight(parts, batch), Tensor)
        self.suspects = self._has_grads = True
        one = parts.micro >= batch.num_rows
        self._whole = Compiled(self._whole_step, cpp_wrapper=cpp_wrapper) if one else None
        self._pieces = {
            piece.num_rows: Compiled(self._gradients, cpp_wrapper=cpp_wrapper)
            for piece in pieces_of(parts, batch)
        }
        self._last = Compiled(self._finish, cpp_wrapper=cpp_wrapper)
        self._fixed: list[Tensor] = []
        self._fixed_of: Slots | None = None
        self._draws: bool | None = None
        self._bounds = torch.empty(3, dtype=torch.float64)
        self._rates = torch.empty(len(parts.base_lr), dtype=torch.float64)
        self._write_bounds, self._write_rates = self._bounds.numpy(), self._rates.numpy()

    def __call__(self, batch: Minibatch, multiplier: float, *, check: bool = False) -> Attempt | None:
        """Attempts one update; None if it is one for `train_step`: nothing was changed then.

        check: looks whether anything has changed that the graph took for constant, as is done now and then.

        Raises:
            ChangedError: it has; nothing was changed by this step.
        """
        parts, step, data = self._parts, batch.slots.step, leaves(batch.data)
        check |= self.suspects or step % self.check_every == 0
        if check and not self._unchanged():
            raise ChangedError
        total = known_weight(parts, batch)
        unusual = step == 0 or (step + 1) % self._every == 0 or batch.weights is not None
        if unusual or _shapes(data) != self._shapes or isinstance(total, Tensor) != self._weighs:
            self._has_grads = True
            return None
        self.suspects = False
        loss_bound, norm_bound = parts.guard.lets_pass(step)
        rates = [lr * multiplier for lr in parts.base_lr]
        far = FAR_FROM_OVERFLOW / max(1.0, *map(abs, rates))
        self._write_bounds[:] = loss_bound, min(norm_bound, far), far
        self._write_rates[:] = rates
        row, num_micro = self._run(batch, data, total, check)
        loss, grad_norm, _, applied = row.tolist()
        if not applied:
            self._has_grads = True
            return None
        if self._has_grads:  # of an eager step before
            for p in parts.params:
                p.grad = None
            self._has_grads = False
        scale, loss_scale = parts.precision.scale, None
        permit = parts.guard.permit_on_host(loss, grad_norm, step=step, scaled=scale is not None)
        if scale is not None:
            loss_scale = scale.scale
            scale.adjust(_YES)
        for group, rate in zip(parts.updater.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        at = row.unbind()
        return Attempt(at[0], at[1], at[2], _YES, permit.verdict, permit.clip, loss_scale, num_micro)

    def _run(self, batch: Minibatch, data: list[Tensor], total: Any, check: bool) -> tuple[Tensor, int]:
        """Loss, norm of the gradient, update ratio, whether it was applied: float64[4]; and the passes."""
        parts, params = self._parts, self._params
        slots, buffers = self._update.slots(), parts.buffers.live(self._buffers)
        scale = None if parts.precision.scale is None else parts.precision.scale.scale
        draws = 0 if self._draws is False else word(parts.draws, batch.slots.step)
        if self._whole is not None:
            if self._draws is not False:
                torch.default_generator.manual_seed(word(draws, 0))
            if slots is not self._fixed_of:
                self._fixed, self._fixed_of = [*params, *_flat(slots), self._bounds, self._rates], slots
            whole = (params, slots, buffers, batch.data, total, scale, self._bounds, self._rates)
            row = self._whole(whole, self._fixed, [*data, *buffers, total, scale], check=check)
            if self._draws is None:
                fresh = torch.Generator().manual_seed(word(draws, 0)).get_state()
                self._draws = not torch.equal(torch.default_generator.get_state(), fresh)
            return row, 1
        loss, grads, pieces = None, [], list(pieces_of(parts, batch))
        after = [b.clone() for b in buffers]  # never the model's own: torch would trace that otherwise
        for piece in pieces:
            torch.default_generator.manual_seed(word(draws, piece.micro))
            of_piece = (params, piece.data, piece.num_rows, after, total, scale)
            share, added, after = self._pieces[piece.num_rows](of_piece)
            if loss is None:
                loss, grads = share, added
            else:
                loss = loss + share
                torch._foreach_add_(grads, added)
        last = (params, slots, buffers, after, loss, grads, scale, self._bounds, self._rates)
        return self._last(last), len(pieces)

    # ------------------------------------------------------------------------- below: what is compiled

    def _whole_step(
        self,
        params: list[Tensor],
        slots: Slots,
        buffers: list[Tensor],
        data: Tree,
        total: Tensor | float | None,
        scale: Tensor | None,
        bounds: Tensor,
        rates: Tensor,
    ) -> Tensor:
        loss, grads, after = self._gradients(params, data, self._num_rows, buffers, total, scale)
        return self._finish(params, slots, buffers, after, loss, grads, scale, bounds, rates)

    def _gradients(
        self,
        params: list[Tensor],
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
            with parts.precision.forward(), parts.precision.attention():
                losses, weights = functional_call(self._called, {**values, **named}, (data, num_rows))
            weight = total
            if weight is None and weights is None:
                weight = float(self._num_rows)
            elif weight is None:
                assert num_rows == self._num_rows, "weights that are known after the forward pass only"
                weight = positive(weights.sum())
            found = share_of(losses, weights, weight)
            return (found if scale is None else found * scale), (found.detach(), after)

        values = {f"model.{name}": p for name, p in zip(self._names, params, strict=True)}
        grads, (_, (loss, after)) = grad_and_value(share, has_aux=True)(values)
        return loss, list(grads.values()), after

    def _finish(
        self,
        params: list[Tensor],
        slots: Slots,
        buffers: list[Tensor],
        after: list[Tensor],
        loss: Tensor,
        grads: list[Tensor],
        scale: Tensor | None,
        bounds: Tensor,
        rates: Tensor,
    ) -> Tensor:
        """The rest of the step, from the gradients on."""
        if scale is not None:
            grads = [g * (1.0 / scale) for g in grads]
        norm = clipped = global_norm(grads)
        for transform in self._parts.transforms:
            changed = transform(grads, clipped)
            clipped = global_norm(grads) if changed is None else changed
        changing = [*params, *_flat(slots)]
        old = [t.clone() for t in changing]
        self._update(params, grads, slots, rates)
        moved = global_norm([p - o for p, o in zip(params, old[: len(params)], strict=True)])
        size = global_norm([*old[: len(params)], *self._others])
        applied = (loss <= bounds[0]) & (norm <= bounds[1]) & (size <= bounds[2]) & torch.isfinite(moved)
        for now, then in zip(changing, old, strict=True):
            now.copy_(torch.where(applied, now, then))
        for now, new in zip(buffers, after, strict=True):
            now.copy_(torch.where(applied, new, now))
        return torch.stack([n.double() for n in (loss, norm, moved / size, applied)])


class _Called(nn.Module):
    """The objective as a module, since parameters are exchanged in one."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.model, self._parts = parts.model, parts

    def forward(self, data: Tree, num_rows: int) -> tuple[Tensor, Tensor | None]:
        return losses_and_weights(self._parts, data, num_rows)


def _shapes(data: list[Any]) -> list[Any]:
    """All that what was compiled takes for granted of a batch; it gets each tensor as one of its own."""
    ids = list(map(id, data))
    return [(leaf.shape, leaf.dtype, leaf.stride(), ids.index(id(leaf))) for leaf in data]


def _flat(slots: Slots) -> list[Tensor]:
    return [s for group in slots for named in group for s in named if s is not None]
