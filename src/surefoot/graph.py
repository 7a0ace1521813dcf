"""The whole step as one graph: what `train_step` does, compiled, for steps in which nothing is unusual.

Forward and backward pass, gradient transforms, norm, permission, update and the numbers of the log row are
one function of tensors. The guard says beforehand up to which loss and norm it is certain to permit an
update; a step beyond, or with a sample left out, leaves everything as it was, and `train_step` takes it. It
takes the first ones, too, up to the update that makes the optimizer's state. All of this depends on the
step and the state alone, so a run that is continued or replayed chooses alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surefoot.compiled import ChangedError, Compiled
from surefoot.direct import Bounds, Direct
from surefoot.guard.layers import layers_of
from surefoot.keys import seed_of
from surefoot.optim.functional import FunctionalUpdate, Slots
from surefoot.optim.update import FAR_FROM_OVERFLOW
from surefoot.traced import Traced, flat
from surefoot.train_step import Attempt, Parts, known_weight, pieces_of
from surefoot.types import Minibatch, Tree, leaves
from surefoot.unchanged import Unchanged

_YES, _NUM_BOUNDS = torch.tensor(True), 4
CHECK_EVERY = 800
"""Steps that end at a multiple of it check all that the trace depended on."""


class Graph:
    """Steps of one run, compiled; see `surefoot.choice` for whether that is possible.

    Args:
        batch: as all others will be. An eager pass with it is just done, so that it is known what gets a
            gradient and which buffers change.

    suspects: the next step checks all that the trace depended on; to be set after code of others has run.
    trained: the parameters that get a gradient. layers: the weights among them. is_whole: a step is one
    function, and not several passes.
    """

    def __init__(self, parts: Parts, batch: Minibatch) -> None:
        self._parts = parts
        named = {name: p for name, p in parts.model.named_parameters() if p.requires_grad}
        trained = {name: p for name, p in named.items() if p.grad is not None}
        self.trained = list(trained.values())
        self.layers = layers_of(parts.model, self.trained)
        self._params = [p.detach() for p in self.trained]
        others = [p.detach() for name, p in named.items() if name not in trained]
        self._update = FunctionalUpdate(parts.updater.optimizer, self.trained)
        self._buffers = list(parts.buffers.changing)
        self._form, self._num_rows = form(batch.data, leaves(batch.data)), batch.num_rows
        traced = Traced(parts, trained, others, self._update, self._buffers, batch.num_rows)
        self._unchanged = Unchanged(parts.model, [parts.objective, *parts.transforms])
        self._weight = _kind(known_weight(parts, batch))
        self.suspects = self._has_grads = True
        one = parts.micro >= batch.num_rows
        self.is_whole = one
        self._whole = Compiled(traced.whole) if one else None
        self._pieces = {piece.num_rows: Compiled(traced.gradients) for piece in pieces_of(parts, batch)}
        self._last = Compiled(traced.finish)
        self._fixed: list[Tensor] = []
        self._fixed_of: Slots | None = None
        self._draws: bool | None = None
        self._bounds = torch.empty(_NUM_BOUNDS, dtype=torch.float64)
        self._most_lr = max(map(abs, parts.base_lr))
        self._rates = torch.empty(len(parts.base_lr), dtype=torch.float64)
        self._write_bounds, self._write_rates = self._bounds.numpy(), self._rates.numpy()

    def __call__(self, batch: Minibatch, multiplier: float, *, check: bool = False) -> Attempt | None:
        """Attempts one update; None if it is one for `train_step`: nothing was changed then.

        check: looks whether anything has changed that the graph took for constant, as is done now and then.

        Raises:
            ChangedError: it has; nothing was changed by this step.
        """
        parts, step, data = self._parts, batch.slots.step, leaves(batch.data)
        check |= self.suspects or (step + 1) % CHECK_EVERY == 0
        if check and not self._unchanged():
            raise ChangedError
        total = known_weight(parts, batch)
        slots = self._update.slots()
        if step == 0 or slots is None or not self._usual(batch, data, total):
            self._has_grads = True
            self.suspects |= check  # it is due as before
            return None
        self.suspects = False
        self._write(self._setting(parts.guard.lets_pass(step), multiplier))
        (row, norms), num_micro = self._run(batch, data, slots, total, check)
        loss, grad_norm, _, applied = row.tolist()
        if not applied:
            self._has_grads = True
            return None
        self._drop_grads()
        scale, loss_scale = parts.precision.scale, None
        permit = parts.guard.permit_on_host(loss, grad_norm, step=step, scaled=scale is not None)
        if scale is not None:
            loss_scale = scale.scale.clone()
            scale.adjust(_YES)
        parts.updater.set_rates(multiplier, parts.base_lr)
        at = row.unbind()
        return Attempt(
            at[0], at[1], at[2], _YES, permit.verdict, permit.clip, loss_scale, num_micro,
            self.trained, norms,
        )  # fmt: skip

    def direct(self, step: int) -> tuple[int, Direct | None]:
        """How many steps from `step` on need no look at anything but what comes out; and what takes them.
        Their batches are of the arrays that the first was of. Drops the gradients of an eager step.
        """
        parts, whole = self._parts, self._whole
        if (
            whole is None or not whole.is_direct(self._fixed) or self._draws is None
            or self.suspects or parts.precision.scale is not None
            or step == 0 or self._update.slots() is not self._fixed_of
        ):  # fmt: skip
            return 0, None
        self._drop_grads()
        buffers, num_rows, weight = parts.buffers.live(self._buffers), self._num_rows, self._weight

        def tensors_of(batch: Minibatch) -> list[Any] | None:
            total = known_weight(parts, batch)
            if batch.weights is not None or batch.num_rows != num_rows or _kind(total) != weight:
                return None
            return [*leaves(batch.data), *buffers, total, None]

        def seed(step: int) -> None:
            torch.default_generator.manual_seed(seed_of(parts.draws, step, 0))

        laps = whole.laps((self._bounds, self._rates)) if not self._draws else None
        direct = Direct(
            whole.again, laps, tensors_of=tensors_of, setting_of=self._setting, write=self._write,
            seed=seed if self._draws else None,
        )  # fmt: skip
        return CHECK_EVERY - 1 - step % CHECK_EVERY, direct

    def _drop_grads(self) -> None:
        """Those of an eager step before."""
        if self._has_grads:
            for p in self._parts.params:
                p.grad = None
            self._has_grads = False

    def _usual(self, batch: Minibatch, data: list[Any], total: Any) -> bool:
        """Whether the batch is one of those that were compiled for."""
        same = batch.weights is None and _kind(total) == self._weight
        return same and form(batch.data, data) == self._form

    def _setting(self, bounds: Bounds, multiplier: float) -> list[float]:
        """What a step is applied up to, and its rates."""
        loss, norm, growth = bounds
        far = FAR_FROM_OVERFLOW / max(1.0, self._most_lr * abs(multiplier))
        return [loss, min(norm, far), far, growth, *(lr * multiplier for lr in self._parts.base_lr)]

    def _write(self, setting: list[float]) -> None:
        self._write_bounds[:], self._write_rates[:] = setting[:_NUM_BOUNDS], setting[_NUM_BOUNDS:]

    def _run(
        self, batch: Minibatch, data: list[Tensor], slots: Slots, total: Any, check: bool
    ) -> tuple[Sequence[Tensor], int]:
        """What `Traced.finish` returns, and the number of passes."""
        parts, params = self._parts, self._params
        buffers = parts.buffers.live(self._buffers)
        scale = None if parts.precision.scale is None else parts.precision.scale.scale
        draws, step = parts.draws, batch.slots.step
        if self._whole is not None:
            if self._draws is not False:
                torch.default_generator.manual_seed(seed_of(draws, step, 0))
            if slots is not self._fixed_of:
                self._fixed, self._fixed_of = [*params, *flat(slots), self._bounds, self._rates], slots
            whole = (params, slots, buffers, batch.data, total, scale, self._bounds, self._rates)
            numbers = self._whole(whole, self._fixed, [*data, *buffers, total, scale], check=check)
            if self._draws is None:
                fresh = torch.Generator().manual_seed(seed_of(draws, step, 0)).get_state()
                self._draws = not torch.equal(torch.default_generator.get_state(), fresh)
            return numbers, 1
        loss, grads, pieces = None, [], list(pieces_of(parts, batch))
        after = [b.clone() for b in buffers]  # never the model's own: torch would trace that otherwise
        for piece in pieces:
            torch.default_generator.manual_seed(seed_of(draws, step, piece.micro))
            of_piece = (params, piece.data, piece.num_rows, after, total, scale)
            share, added, after = self._pieces[piece.num_rows](of_piece)
            if loss is None:
                loss, grads = share, added
            else:
                loss = loss + share
                torch._foreach_add_(grads, added)
        last = (params, slots, buffers, after, loss, grads, scale, self._bounds, self._rates)
        return self._last(last), len(pieces)


def _kind(total: Any) -> Any:
    """Of a batch's weight: nothing if it is a number."""
    return (total.dtype, total.shape) if isinstance(total, Tensor) else None


def form(tree: Tree, data: list[Any]) -> tuple[Any, ...]:
    """All that what was compiled, or captured, takes for granted of a batch: its nest, and of its leaves
    `data`, each of which it gets as one of its own, how they lie in memory. What is no tensor is like
    nothing else: it would be a constant.
    """
    ids = list(map(id, data))
    return _nest(tree), *(
        (leaf.shape, leaf.dtype, leaf.stride(), leaf.requires_grad, ids.index(id(leaf)))
        if isinstance(leaf, Tensor)
        else object()
        for leaf in data
    )


def _nest(tree: Tree) -> Any:
    """Types and keys of a nest, in order."""
    if isinstance(tree, dict):
        return type(tree), *((key, _nest(branch)) for key, branch in tree.items())
    return (type(tree), *map(_nest, tree)) if isinstance(tree, (tuple, list)) else None
