"""Undoing what a step did to the state of an optimizer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from surefoot.optim.finite import can_be_looked_at


class Undo:
    """The state of an optimizer before a step, to go back to."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._state = {
            p: {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in slots.items()}
            for p, slots in optimizer.state.items()
        }

    def state_is_finite(self) -> bool:
        """Whether the state after the step is, where it was before."""
        for p, slots in self._optimizer.state.items():
            for name, value in slots.items():
                if not (isinstance(value, Tensor) and value.ndim and can_be_looked_at(value)):
                    continue
                if not torch.isfinite(value).all():
                    before = self._state.get(p, {}).get(name)
                    if before is None or torch.isfinite(before).all():
                        return False
        return True

    def __call__(self) -> None:
        """Goes back."""
        for p, slots in list(self._optimizer.state.items()):
            if p not in self._state:
                del self._optimizer.state[p]
                continue
            for name, value in self._state[p].items():
                if isinstance(value, Tensor):
                    slots[name].copy_(value)
                else:
                    slots[name] = value
