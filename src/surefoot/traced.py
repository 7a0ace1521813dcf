"""What a compiled step computes: functions of tensors, traced whole.

Everything else that they read counts as constant: the objective, the transforms, the optimizer's settings,
and which parameters get a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from surefoot.optim.functional import FunctionalUpdate, Slots
from surefoot.optim.gradients import global_norm, norms_of
from surefoot.optim.statistics import growth
from surefoot.train_step import Parts, losses_and_weights, positive, share_of
from surefoot.types import Tree


class Traced:
    """The functions of one run.

    Args:
        trained: the parameters that get a gradient, by name.
        others: trainable ones that get none; they count in the size of the weights.
        buffers: names of those that change.
        num_rows: of a batch.
    """

    def __init__(
        self,
        parts: Parts,
        trained: dict[str, nn.Parameter],
        others: Sequence[Tensor],
        update: FunctionalUpdate,
        buffers: Sequence[str],
        num_rows: int,
    ) -> None:
        self._parts, self._names, self._others = parts, list(trained), others
        self._update, self._buffers, self._num_rows = update, buffers, num_rows
        index = {name: i for i, name in enumerate(buffers)}
        self._statistics = [index[name] for name in parts.buffers.statistics] if parts.guard.on else []
        self._settings = parts.buffers.settings()
        self._called = _Called(parts)

    def whole(
        self,
        params: list[Tensor],
        slots: Slots,
        buffers: list[Tensor],
        data: Tree,
        total: Tensor | float | None,
        scale: Tensor | None,
        bounds: Tensor,
        rates: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The whole step; see `finish`."""
        loss, grads, after = self.gradients(params, data, self._num_rows, buffers, total, scale)
        return self.finish(params, slots, buffers, after, loss, grads, scale, bounds, rates)

    def gradients(
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

    def finish(
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
    ) -> tuple[Tensor, Tensor]:
        """The rest of the step, from the gradients on. float64[4]: loss, gradient norm, update ratio,
        whether it was applied; and the gradient's norms per parameter.
        """
        if scale is not None:
            grads = [g * (1.0 / scale) for g in grads]
        norms = norms_of(grads)
        norm = clipped = torch.linalg.vector_norm(norms)
        for transform in self._parts.transforms:
            changed = transform(grads, clipped)
            clipped = global_norm(grads) if changed is None else changed
        changing = [*params, *flat(slots)]
        old = [t.clone() for t in changing]
        self._update(params, grads, slots, rates)
        moved = global_norm([p - o for p, o in zip(params, old[: len(params)], strict=True)])
        size = global_norm([*old[: len(params)], *self._others])
        within = (loss <= bounds[0]) & (norm <= bounds[1]) & (size <= bounds[2])
        if self._statistics:
            kept, left = ([at[i] for i in self._statistics] for at in (buffers, after))
            within &= growth(kept, left, self._settings) <= bounds[3]
        applied = within & torch.isfinite(loss) & torch.isfinite(moved)
        for now, then in zip(changing, old, strict=True):
            now.copy_(torch.where(applied, now, then))
        for now, new in zip(buffers, after, strict=True):
            now.copy_(torch.where(applied, new, now))
        return torch.stack([n.double() for n in (loss, norm, moved / size, applied)]), norms


class _Called(nn.Module):
    """The objective as a module, since parameters are exchanged in one."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.model, self._parts = parts.model, parts

    def forward(self, data: Tree, num_rows: int) -> tuple[Tensor, Tensor | None]:
        return losses_and_weights(self._parts, data, num_rows)


def flat(slots: Slots) -> list[Tensor]:
    """All tensors of these."""
    return [s for group in slots for named in group for s in named if s is not None]
