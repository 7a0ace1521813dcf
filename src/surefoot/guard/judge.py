"""The detectors within a step at work: what they have seen, and the decision on the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from surefoot.guard.arithmetic import Numbers, Tensors
from surefoot.guard.detect import (
    BLOCK,
    BURN_IN,
    EARLIEST,
    LAG,
    YOUNG,
    Decision,
    Limits,
    Statistics,
    begin,
    calm_below,
    judge,
    limits,
    take_up,
)

CALM = Decision(0.0, 1.0, False)


class Judge:
    """Decides on steps, in order. On a CPU losses and norms are floats, on a device 0-d float64 tensors.

    seen: statistics of the steps before; None within the burn-in. allowed: what follows from them.
    was_high: of the last decision. num_blocks: that were taken up.

    Args:
        on_host: whether they are floats; by the device, if left out.
    """

    def __init__(self, device: torch.device, *, on_host: bool | None = None) -> None:
        self.seen: Statistics | None = None
        self.allowed: Limits | None = None
        self.was_high: Any = False
        self.num_blocks = 0
        self.on_host = device.type == "cpu" if on_host is None else on_host
        self._xp: Any = Numbers() if self.on_host else Tensors(device)
        self._losses: list[Any] = []  # that are not taken up yet
        self._norms: list[Any] = []
        self._full_at = BURN_IN  # so many of them
        self._calm_loss = self._calm_norm = -math.inf
        self._upcoming: tuple[Statistics, Limits] | None = None

    def take(self, loss: Any, norm: Any) -> Decision:
        """The decision on a step, which is taken up."""
        if self.on_host and -math.inf < loss <= self._calm_loss and norm <= self._calm_norm:
            decision = CALM
        else:
            decision = self.decide(loss, norm)
        self.taken(loss, norm, high=decision.high)
        return decision

    def taken(self, loss: Any, norm: Any, *, high: Any) -> None:
        """Takes up a step that was decided on by what is `allowed`. high: of that decision."""
        self.was_high = high
        losses = self._losses
        losses.append(loss)
        self._norms.append(norm)
        if len(losses) >= self._full_at:
            self._take_up()

    def _take_up(self) -> None:
        if self.seen is None:
            self.seen, num = self._begun(), BURN_IN
            self.allowed = limits(self._xp, self.seen)
        else:
            (self.seen, self.allowed), num = self._next(), BLOCK
            self.num_blocks += 1
        self._losses, self._norms, self._upcoming = self._losses[num:], self._norms[num:], None
        self._follow()

    def _next(self) -> tuple[Statistics, Limits]:
        """The statistics with the block that is full, and what follows."""
        if self._upcoming is None:
            assert self.seen is not None
            assert self.allowed is not None
            block = (self._xp.together(values[:BLOCK]) for values in (self._losses, self._norms))
            seen = take_up(self._xp, self.seen, self.allowed, *block)
            self._upcoming = seen, limits(self._xp, seen)
        return self._upcoming

    def calm_after(self, num: int) -> tuple[int, float, float]:
        """How many steps, after that many more which are `CALM`, have bounds that are known by now; and
        these: loss and norm up to which a step is certain to be; on a host.
        """
        if self.seen is None:
            return 0, -math.inf, -math.inf
        left = self._full_at - len(self._losses) - num
        if left > 0:
            return left, self._calm_loss, self._calm_norm
        if len(self._losses) < BLOCK:
            return 0, -math.inf, -math.inf
        return BLOCK + left, *calm_below(self._next()[1])

    def take_calm(self, losses: Sequence[float], norms: Sequence[float]) -> None:
        """Takes up that many steps at most, all of them `CALM`."""
        self._losses += losses
        self._norms += norms
        self.was_high = CALM.high
        if len(self._losses) >= self._full_at:
            self._take_up()

    def decide(self, loss: Any, norm: Any) -> Decision:
        """The decision on a step with these numbers; nothing is taken up."""
        allowed, early = self.allowed, self.seen is None
        if early and len(self._losses) >= EARLIEST:
            allowed = self._early()
        return judge(self._xp, allowed, loss, norm, was_high=self.was_high, early=early)

    def certain_below(self) -> tuple[float, float]:
        """Loss and norm up to which the next decision is certain to be `CALM`; on a host."""
        if self.seen is not None:
            return self._calm_loss, self._calm_norm
        if len(self._losses) < EARLIEST:
            return math.inf, math.inf
        return calm_below(self._early())

    def tensor_or_float(self, number: Any) -> Any:
        """A number as the decisions take it."""
        return self._xp.number(number)

    def _begun(self) -> Statistics:
        return begin(self._xp, self._xp.together(self._losses), self._xp.together(self._norms))

    def _early(self) -> Limits:
        return limits(self._xp, self._begun(), early=True)

    def _follow(self) -> None:
        """What follows from `seen` and `num_blocks`."""
        block = BLOCK if self.num_blocks < YOUNG else BLOCK + LAG
        self._full_at = BURN_IN if self.seen is None else block
        self._calm_loss = self._calm_norm = -math.inf
        if self.allowed is not None and self.on_host:
            self._calm_loss, self._calm_norm = calm_below(self.allowed)

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        seen = self.seen
        return {
            "losses": [float(x) for x in self._losses],
            "norms": [float(x) for x in self._norms],
            "seen": None if seen is None else _as_json(seen),
            "height": 0.0 if seen is None else float(seen.height),
            "was_high": bool(self.was_high),
            "num_blocks": self.num_blocks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, or an earlier version's."""
        self._losses = [self.tensor_or_float(x) for x in state.get("losses", [])]
        self._norms = [self.tensor_or_float(x) for x in state.get("norms", [])]
        seen = state.get("seen")
        self.seen = None
        if seen:
            (log_mean, mean), (log_var, var), first = seen
            numbers = log_mean, log_var, mean, var, first, state.get("height", 0.0)
            self.seen = Statistics(*map(self._xp.number, numbers))
        self.num_blocks = state.get("num_blocks", 0)
        self.was_high, self._upcoming = state.get("was_high", False), None
        self.allowed = None if self.seen is None else limits(self._xp, self.seen)
        self._follow()


def _as_json(seen: Statistics) -> list[Any]:
    """As it is kept."""
    log_mean, log_var, mean, var, first, _ = map(float, seen)
    return [[log_mean, mean], [log_var, var], first]
