"""The last part of a step: apply the update if it is permitted, or leave everything as it was."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from surefoot.optim.gradients import global_norm


class Updater:
    """Applies updates of an optimizer.

    On a CPU the go-ahead is read at once, which costs nothing, and a refused update does not call the
    optimizer at all; so it holds for any optimizer. On a GPU, optimizers with ``fused=True`` take the
    go-ahead as a device tensor, as torch's gradient scaler gives it; for the others it is read.

    Args:
        optimizer: over parameters of `params`.
        params: all trainable parameters, in the model's order.
        measure_every: `update_ratio` is measured in steps that are multiples of it: it costs a copy
            of the weights.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor], *, measure_every: int) -> None:
        self.optimizer, self.params = optimizer, [p.detach() for p in params]
        self._every = measure_every
        self._copies = self._new_copies() if measure_every == 1 else None
        self._unmeasured = torch.tensor(torch.nan, device=self.params[0].device)
        on_device = self.params[0].device.type == "cuda"
        self._asks_device = on_device and all(g.get("fused") for g in optimizer.param_groups)
        if self._asks_device:
            self._create_momentum()

    def _create_momentum(self) -> None:
        """Zero momentum buffers before the first step: if torch's fused SGD is told to skip its first
        step it keeps an uninitialised buffer. Equal to torch's own first step if nothing dampens.
        """
        for group in self.optimizer.param_groups:
            if not group.get("momentum") or not isinstance(self.optimizer, torch.optim.SGD):
                continue
            if group["dampening"]:
                self._asks_device = False
                return
            for p in group["params"]:
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def apply(
        self, permitted: Tensor, *, step: int, multiplier: float, base: list[float]
    ) -> tuple[Tensor, Tensor]:
        """One update, if `permitted` (bool, 0-d), at the rates ``base[group] * multiplier``.

        Returns the update ratio (2-norm of the change over 2-norm of the weights before; NaN where it is
        not measured, 0 where the update is refused), and whether the update was applied. On a CPU a
        measured update that turns out not to be finite (an optimizer divided zero by zero) is undone.
        """
        for group, lr in zip(self.optimizer.param_groups, base, strict=True):
            group["lr"] = lr * multiplier
        if not self._asks_device and not permitted.item():
            return torch.zeros_like(self._unmeasured), permitted
        measured = step % self._every == 0
        if measured:  # what is seldom used is not kept: it is twice the size of the weights
            before, change = self._copies or self._new_copies()
            before.take(self.params)
        if self._asks_device:
            self.optimizer.found_inf = (~permitted).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if not measured:
            return self._unmeasured, permitted
        change.take(self.params)
        moved = torch.linalg.vector_norm(change.all.sub_(before.all))
        if not self._asks_device and not math.isfinite(moved.item()):
            torch._foreach_copy_(self.params, before.parts)
            return torch.zeros_like(self._unmeasured), ~permitted
        return moved / torch.linalg.vector_norm(before.all), permitted

    def _new_copies(self) -> tuple[_Flat, _Flat]:
        return _Flat(self.params), _Flat(self.params)

    def finite(self) -> bool:
        """Whether all weights are."""
        return bool(torch.isfinite(global_norm(self.params)).item())


class _Flat:
    """Copies of tensors, end to end in one, so that a norm over all of them is one operation: a third of
    the time for the ten thousand weights of a small network. Its dtype holds all of theirs exactly.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        dtype = functools.reduce(torch.promote_types, [t.dtype for t in like])
        sizes = [t.numel() for t in like]
        self.all = torch.empty(sum(sizes), dtype=dtype, device=like[0].device)
        split = zip(torch.split(self.all, sizes), like, strict=True)
        self.parts = [part.view(tensor.shape) for part, tensor in split]

    def take(self, tensors: list[Tensor]) -> None:
        """Copies them."""
        torch._foreach_copy_(self.parts, tensors)


class Buffers:
    """Buffers that the forward pass changes (batch-norm statistics), so that it can be undone.

    Those of norms always count, since torch's batch norm changes them without counting versions. Of the
    others, what the first forward pass changes does, by value, and what changes later is noticed by its
    version, until when its first copy is good. So constant tables cost memory once and no time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = {name: b for name, b in model.named_buffers() if b.numel()}
        self._kept: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._learned = False
        norms = {
            id(b) for m in model.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False)
        }
        self.changing = [name for name, b in self._live.items() if id(b) in norms]

    def remember(self) -> None:
        """Before the first forward pass of a step."""
        if not self._live:
            return
        if not self._kept:
            self._kept = {name: b.detach().clone() for name, b in self._live.items()}
            self._versions = {name: b._version for name, b in self._live.items()}
        elif self.changing:
            torch._foreach_copy_(
                [self._kept[name] for name in self.changing],
                [self._live[name] for name in self.changing],
            )

    def settle(self, permitted: Tensor, *, on_host: bool) -> None:
        """After the last one: keep the changes if `permitted` (bool, 0-d), else undo them."""
        if not self._live:
            return
        for name, live in self._live.items():
            if name not in self.changing and (
                live._version != self._versions[name]
                or not (self._learned or torch.equal(live, self._kept[name]))
            ):
                self.changing.append(name)
        self._learned = True
        if on_host and permitted.item():
            return
        for name in self.changing:
            live, kept = self._live[name], self._kept[name]
            live.copy_(kept if on_host else torch.where(permitted, live, kept))

    def transient(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those that change and are not among `names`: registered as not persistent."""
        known = set(names)
        return {name: self._live[name] for name in self.changing if name not in known}

    def put_back(self, values: dict[str, Tensor]) -> None:
        """Restores what `transient` gave, and counts it among those that change."""
        for name, value in values.items():
            self._live[name].copy_(value)
            if name not in self.changing:
                self.changing.append(name)
