"""The last part of a step: apply the update if it is permitted, or leave everything as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from surefoot.optim.direct import fused_sgd_step
from surefoot.optim.finite import are_finite, have_nan
from surefoot.optim.flat import EndToEnd, Flat, end_to_end
from surefoot.optim.gradients import global_norm, rounded
from surefoot.optim.rates import DeviceRates
from surefoot.optim.uncompiled import bare_step
from surefoot.optim.undo import Undo

_WELL_KNOWN = {
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
}
_FUSED = {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW}
FAR_FROM_OVERFLOW = 1e15


class Updater:
    """Applies updates of an optimizer. well_known: it is torch's own, and divides by nothing below its eps.

    On a CPU the go-ahead is read at once, which costs nothing, and a refused update does not call the
    optimizer at all; so it holds for any optimizer. On a GPU, optimizers with ``fused=True`` take the
    go-ahead as a device tensor, as torch's gradient scaler gives it, and their rates, too; for the others
    it is read. asks_device: so it is here, and an update waits for nothing.

    Args:
        optimizer: over parameters of `params`.
        params: all trainable parameters, in the model's order.
        measure_every: `update_ratio` is measured in steps that are multiples of it: it costs a copy
            of the weights.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor], *, measure_every: int) -> None:
        self.optimizer, self._own = optimizer, list(params)
        self.params = [p.detach() for p in params]
        self._every = measure_every
        self._copies = self._new_copies() if measure_every == 1 else None
        self._end_to_end: EndToEnd | None = None
        self._unmeasured = torch.tensor(torch.nan, device=self.params[0].device)
        on_device = self.params[0].device.type == "cuda"
        fused = type(optimizer) in _FUSED and all(g["fused"] for g in optimizer.param_groups)
        self.asks_device = on_device and fused
        self._size = global_norm(self.params).item()
        groups = optimizer.param_groups
        self._largest_lr = max(float(g["lr"]) for g in groups)
        half = any(p.dtype == torch.float16 for p in self.params)  # in which 1e-8 is zero
        self.well_known = type(optimizer) in _WELL_KNOWN and not half
        self.well_known &= all(g.get("eps") != 0 and abs(g.get("momentum") or 0.0) < 1 for g in groups)
        self._step = type(optimizer).step
        self._bare_step = bare_step(optimizer) if type(optimizer) in _WELL_KNOWN else None
        if self.asks_device:
            self._create_momentum()
        self._rates = DeviceRates(optimizer) if self.asks_device else None

    def _create_momentum(self) -> None:
        """Zero momentum buffers before the first step: if torch's fused SGD is told to skip its first
        step it keeps an uninitialised buffer. Equal to torch's own first step if nothing dampens.
        """
        for group in self.optimizer.param_groups:
            if not group.get("momentum") or not isinstance(self.optimizer, torch.optim.SGD):
                continue
            if group["dampening"]:
                self.asks_device = False
                return
            for p in group["params"]:
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def apply(
        self,
        permitted: Tensor,
        *,
        step: int,
        multiplier: float,
        base: list[float],
        grad_norm: Tensor,
        heals: bool = True,
    ) -> tuple[Tensor | float, Tensor]:
        """One update, if `permitted` (bool, 0-d), at the rates ``base[group] * multiplier``.

        heals: the guard does. Without it a gradient that is no number stays in what the optimizer keeps, as
        in a loop without one.

        Returns the update ratio (2-norm of the change over 2-norm of the weights before; NaN where it is
        not measured, 0 where the update is refused; 0-d if `asks_device`, else a number), and whether the
        update was applied. On a CPU an update that turns out not to be finite (it overflowed, or the
        optimizer divided zero by zero) is undone, the optimizer's state too. That takes copies, so it is
        watched for where it can happen: see `_tame`.
        """
        self.set_rates(multiplier, base)
        self._follow()
        if not self.asks_device and not permitted.item():
            return 0.0, permitted
        measured = self.measures(step)
        undo = (
            None if self.asks_device or self._tame(grad_norm, multiplier, heals) else Undo(self.optimizer)
        )
        copies = None
        if measured or undo is not None:  # what is seldom used is not kept: it is twice the weights' size
            copies = self._copies or self._new_copies()
            copies[0].take(self.params)
        if self.asks_device:
            self.optimizer.found_inf = (~permitted).float()  # type: ignore[attr-defined]
        self._take_step(copies)
        if copies is None:
            return self._unmeasured if self.asks_device else math.nan, permitted
        before, after = copies
        moved = torch.linalg.vector_norm(after.all.sub_(before.all))
        size = torch.linalg.vector_norm(before.all)
        if self.asks_device:
            return moved / size, permitted
        self._size, change = size.item(), moved.item()
        if not math.isfinite(change) or not (undo is None or undo.state_is_finite()):
            torch._foreach_copy_(self.params, before.parts)
            if undo is not None:
                undo()
            return 0.0, ~permitted
        if moved.dtype != torch.float32 or not self._size:  # by zero torch divides, and Python does not
            return (moved / size).item(), permitted
        return rounded(change / self._size), permitted

    def _take_step(self, copies: tuple[Flat, Flat] | None) -> None:
        """The optimizer's. copies: of the weights before it, and room for those after it."""
        seen = torch._C._autograd._profiler_enabled()  # which is told of it
        if self._bare_step is None or seen or self.is_hooked():
            self.optimizer.step()
        elif self._end_to_end is not None and copies is not None and self._end_to_end.step():
            if self._end_to_end.weights is copies[1]:
                return
        elif self.asks_device or not fused_sgd_step(self.optimizer):
            self._bare_step(self.optimizer)
        if copies is not None:
            copies[1].take(self.params)

    def go_end_to_end(self) -> None:
        """From now on updates are taken for all weights at once, where that is possible and pays: for few,
        none of whose updates is compiled.
        """
        if self._copies is not None:
            self._end_to_end = end_to_end(self.optimizer, self._own, *self._copies)

    def _follow(self) -> None:
        """Takes up that somebody gave a parameter other memory."""
        if not all(map(Tensor.is_set_to, self._own, self.params)):
            self.params = [p.detach() for p in self._own]
            self._copies = self._new_copies() if self._copies else None
            self._end_to_end = None

    def is_hooked(self) -> bool:
        """Whether somebody is to be told of a step: by a hook, which the caller may add at any time, or a
        wrapper.
        """
        return bool(
            self.optimizer._optimizer_step_pre_hooks
            or self.optimizer._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or "step" in vars(self.optimizer)
            or type(self.optimizer).step is not self._step
        )

    def is_torchs(self) -> bool:
        """Whether no code but torch's runs in a step."""
        return self._bare_step is not None and not self.is_hooked()

    def measures(self, step: int) -> bool:
        """Whether `update_ratio` is measured in it."""
        return step % self._every == 0

    def write_rates(self, multiplier: float, base: Sequence[float]) -> None:
        """On a device: what `set_rates` there multiplies, for an update that was captured."""
        assert self._rates is not None
        self._rates.write(multiplier, base)

    def set_rates(self, multiplier: float, base: Sequence[float]) -> None:
        """Sets the rates ``base[group] * multiplier``."""
        if self._rates is not None:
            self._rates.write(multiplier, base)
            self._rates.set()
            return
        for group, lr in zip(self.optimizer.param_groups, base, strict=True):
            group["lr"] = lr * multiplier

    def _tame(self, grad_norm: Tensor, multiplier: float, heals: bool) -> bool:
        """Whether a step cannot leave the finite numbers: torch's own optimizer, which divides by nothing
        below its eps, with numbers whose squares and sums are far from overflowing.
        """
        norm = grad_norm.item()
        if not math.isfinite(norm) and heals:
            return False
        largest = max(self._size, norm) * max(1.0, self._largest_lr * multiplier)
        return self.well_known and largest < FAR_FROM_OVERFLOW

    def _new_copies(self) -> tuple[Flat, Flat]:
        return Flat(self.params), Flat(self.params)

    def weights_are_finite(self) -> bool:
        """Whether all that are trained are."""
        self._follow()
        return math.isfinite(global_norm(self.params).item())

    def state_is_finite(self) -> bool:
        """Whether what the optimizer keeps for the weights is; of what is a single number for each of
        them, and may be infinite, whether it is a number.
        """
        kept = [
            (name, value)
            for slots in self.optimizer.state.values()
            for name, value in slots.items()
            if isinstance(value, Tensor)
        ]
        of_weights, device = {name for name, value in kept if value.ndim}, self.params[0].device
        return are_finite((value for name, value in kept if name in of_weights), device) and not have_nan(
            (value for name, value in kept if name not in of_weights), device
        )
