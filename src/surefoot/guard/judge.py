"""The detectors within a step at work: what they have seen, and the decision on the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surefoot.guard.detect import (
    BLOCK,
    BURN_IN,
    EARLIEST,
    Decision,
    Statistics,
    begin,
    calm_below,
    judge,
    take_up,
    take_up_numbers,
)

CALM = Decision(0.0, 1.0, False)


class Judge:
    """Decides on steps, in order. On a CPU losses and norms are floats, on a device 0-d float64 tensors.

    seen: statistics of the steps before; None within the burn-in.
    """

    def __init__(self, device: torch.device) -> None:
        self.seen: Statistics | None = None
        self.on_host = device.type == "cpu"
        self._device = device
        self._losses: list[Any] = []  # that are not taken up yet
        self._norms: list[Any] = []
        self._calm_loss = self._calm_norm = -math.inf
        self._was_high: Any = False

    def take(self, loss: Any, norm: Any) -> Decision:
        """The decision on a step, which is taken up."""
        if self.on_host and -math.inf < loss <= self._calm_loss and norm <= self._calm_norm:
            decision = CALM
        else:
            decision = self.decide(loss, norm)
        self._was_high = decision.high
        losses = self._losses
        losses.append(loss)
        self._norms.append(norm)
        if len(losses) >= (BURN_IN if self.seen is None else BLOCK):
            self._take_up()
        return decision

    def _take_up(self) -> None:
        if self.seen is None:
            self.seen = self._begun()
        elif self.on_host:
            self.seen = take_up_numbers(self.seen, self._losses, self._norms)
        else:
            self.seen = take_up(torch, self.seen, self._waiting()[1])
        self._losses, self._norms = [], []
        self._set_bounds()

    def calm_for(self) -> int:
        """How many steps that are `CALM` have the same bounds; on a host."""
        return 0 if self.seen is None else BLOCK - len(self._losses)

    def take_calm(self, losses: Sequence[float], norms: Sequence[float]) -> None:
        """Takes up that many steps at most, all of them `CALM`."""
        self._losses += losses
        self._norms += norms
        self._was_high = CALM.high
        if len(self._losses) >= BLOCK:
            self._take_up()

    def decide(self, loss: Any, norm: Any) -> Decision:
        """The decision on a step with these numbers; nothing is taken up."""
        seen, early = self.seen, self.seen is None
        if seen is None and len(self._losses) >= EARLIEST:
            seen = self._begun()
        if not self.on_host:
            return judge(torch, seen, loss, norm, was_high=self._was_high, early=early)
        with np.errstate(all="ignore"):
            numbers = np.float64(loss), np.float64(norm)
            verdict, clip, high = judge(np, seen, *numbers, was_high=self._was_high, early=early)
        return Decision(float(verdict), float(clip), bool(high))

    def certain_below(self) -> tuple[float, float]:
        """Loss and norm up to which the next decision is certain to be `CALM`; on a host."""
        if self.seen is not None:
            return self._calm_loss, self._calm_norm
        if len(self._losses) < EARLIEST:
            return math.inf, math.inf
        return calm_below(self._begun(), early=True)

    def tensor_or_float(self, number: Any) -> Any:
        """A number as the decisions take it."""
        return float(number) if self.on_host else self._tensor(number)

    def _tensor(self, number: Any) -> Tensor:
        return torch.tensor(number, dtype=torch.float64, device=self._device)

    def _waiting(self) -> tuple[Any, Any]:
        """Numpy or torch, and the losses and norms that are not taken up yet: float64[2, n]."""
        if self.on_host:
            return np, np.array((self._losses, self._norms))
        return torch, torch.stack((torch.stack(self._losses), torch.stack(self._norms)))

    def _begun(self) -> Statistics:
        with np.errstate(all="ignore"):  # huge numbers have no square
            return begin(*self._waiting())

    def _set_bounds(self) -> None:
        self._calm_loss = self._calm_norm = -math.inf
        if self.seen is not None and self.on_host:
            self._calm_loss, self._calm_norm = calm_below(self.seen)

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        seen = self.seen
        return {
            "losses": [float(x) for x in self._losses],
            "norms": [float(x) for x in self._norms],
            "seen": None if seen is None else [seen.mean.tolist(), seen.var.tolist(), float(seen.first)],
            "was_high": bool(self._was_high),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, or an earlier version's."""
        self._losses = [self.tensor_or_float(x) for x in state.get("losses", [])]
        self._norms = [self.tensor_or_float(x) for x in state.get("norms", [])]
        seen = state.get("seen")
        array = np.array if self.on_host else self._tensor
        self.seen = Statistics(array(seen[0]), array(seen[1]), seen[2]) if seen else None
        self._was_high = state.get("was_high", False)
        self._set_bounds()
