"""The last part of a step: apply the update if it is permitted, or leave everything as it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


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
        self._before = [torch.empty_like(p) for p in self.params]
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

    def apply(self, permitted: Tensor, *, step: int, multiplier: float, base: list[float]) -> Tensor:
        """One update, if `permitted` (bool, 0-d), at the rates ``base[group] * multiplier``.

        Returns the update ratio: 2-norm of the change over 2-norm of the weights before; NaN where
        it is not measured, 0 where the update is refused.
        """
        for group, lr in zip(self.optimizer.param_groups, base, strict=True):
            group["lr"] = lr * multiplier
        if not self._asks_device and not permitted.item():
            return torch.zeros_like(self._unmeasured)
        measured = step % self._every == 0
        if measured:
            torch._foreach_copy_(self._before, self.params)
        if self._asks_device:
            self.optimizer.found_inf = (~permitted).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if not measured:
            return self._unmeasured
        changes = torch._foreach_sub(self._before, self.params)
        norms = torch.stack(torch._foreach_norm([*changes, *self._before])).view(2, -1)
        change, size = torch.linalg.vector_norm(norms, dim=1).unbind()
        ratio: Tensor = change / size
        return ratio


class Buffers:
    """Buffers that the forward pass changes (batch-norm statistics), so that it can be undone.

    Which they are is learned: what the first forward pass changes is copied before each one from then
    on; what changes later is noticed by torch's version counter, and its first copy is still good until
    then. So constant tables cost memory once and no time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = [b for b in model.buffers() if b.numel()]
        self._kept: list[Tensor] = []
        self._versions: list[int] = []
        self._changing: list[int] = []
        self._learned = False

    def remember(self) -> None:
        """Before the first forward pass of a step."""
        if not self._live:
            return
        if not self._kept:
            self._kept = [b.detach().clone() for b in self._live]
            self._versions = [b._version for b in self._live]
        elif self._changing:
            torch._foreach_copy_(
                [self._kept[i] for i in self._changing], [self._live[i] for i in self._changing]
            )

    def settle(self, permitted: Tensor, *, on_host: bool) -> None:
        """After the last one: keep the changes if `permitted` (bool, 0-d), else undo them."""
        if not self._live:
            return
        if not self._learned:  # by value: batch norm does not count versions
            self._learned = True
            pairs = enumerate(zip(self._live, self._kept, strict=True))
            self._changing = [i for i, (live, kept) in pairs if not torch.equal(live, kept)]
        for i, (buffer, version) in enumerate(zip(self._live, self._versions, strict=True)):
            if buffer._version != version and i not in self._changing:
                self._changing.append(i)
        if on_host and permitted.item():
            return
        for i in self._changing:
            live, kept = self._live[i], self._kept[i]
            live.copy_(kept if on_host else torch.where(permitted, live, kept))
