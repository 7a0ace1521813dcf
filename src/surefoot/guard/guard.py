"""The guard. Permission is decided on the device before an update; review on the host after it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from surefoot.errors import RecipeError
from surefoot.guard.detect import (
    BURN_IN,
    EARLIEST,
    FINE,
    FLOATS,
    NOT_FINITE,
    SAT_OUT,
    TENSORS,
    Decision,
    Ops,
    Statistics,
    begin,
    decide,
    on_host,
    take_up,
)
from surefoot.guard.history import History
from surefoot.guard.review import Alarm, Review
from surefoot.types import check_fields


@dataclass(frozen=True, slots=True)
class Guard:
    """Rules that keep a run healthy, and budgets for what is done about it.

    Args:
        mode: ``"heal"``: updates that are not finite or wild are refused, gradients that are unusually long
            shortened, samples that break a step left out, and a run that diverges goes back to a healthy
            state and goes on otherwise. ``"watch"``: says what it would do, and does nothing. ``"off"``.
        max_refused_in_a_row: after that many refused updates in a row the run ends as ``diverged``.
            (fp16 begins by refusing about a dozen while it finds its loss scale.)
        max_rollbacks: within 10,000 updates; one more, and the run ends as ``diverged``.
        max_rate_cuts: how often in all a rollback may be followed by a lower rate.
        rate_cut: by which factor, or a power of it: the highest that helps is taken.
        max_quarantined: share of all samples that may be left out, or 8 of them, if that is more; one more,
            and the run ends as ``diverged``.
    """

    mode: Literal["heal", "watch", "off"] = "heal"
    max_refused_in_a_row: int = field(default=50, kw_only=True)
    max_rollbacks: int = field(default=3, kw_only=True)
    max_rate_cuts: int = field(default=3, kw_only=True)
    rate_cut: float = field(default=0.5, kw_only=True)
    max_quarantined: float = field(default=0.05, kw_only=True)

    def __post_init__(self) -> None:
        check_fields(self, "guard")
        if self.max_refused_in_a_row < 1:
            raise RecipeError("guard: max_refused_in_a_row must be at least 1.")
        for name in ("max_rollbacks", "max_rate_cuts"):
            if getattr(self, name) < 0:
                raise RecipeError(f"guard: {name} must not be negative.")
        for name in ("rate_cut", "max_quarantined"):
            if not 0 < getattr(self, name) <= 1:
                raise RecipeError(f"guard: {name} must be above 0 and at most 1.")

    def build(self, device: torch.device) -> Watch:
        """The guard of one run."""
        return Watch(self, device)


class Stop(NamedTuple):
    """A verdict of the review: end the run, and why."""

    reason: str
    fix: str


class Permit(NamedTuple):
    """permitted: bool, 0-d, on the device. verdict, clip: see `Decision`; numbers on a CPU, else 0-d."""

    permitted: Tensor
    verdict: float | Tensor
    clip: float | Tensor


_YES, _NO = torch.tensor(True), torch.tensor(False)


class Watch:
    """A guard at work.

    history: what it has done to the run: the only part of its state that going back does not undo.
    pending: an alarm that has not been seen to yet. reviewed: what the review has seen.
    """

    def __init__(self, rules: Guard, device: torch.device) -> None:
        self.rules = rules
        self.heals = rules.mode == "heal"
        self.history = History()
        self.pending: Alarm | None = None
        self._device = device
        self._on_host = device.type == "cpu"
        self._on = rules.mode != "off"
        self._age = 0
        self._early = torch.full((2, BURN_IN), torch.nan, dtype=torch.float64, device=device)
        self._seen: Statistics | None = None
        self.reviewed = Review()
        self.num_refused_in_a_row = 0

    def permit(self, loss: Tensor, grad_norm: Tensor, *, step: int, scaled: bool) -> Permit:
        """Whether the update of `step` may be applied, and at what length; both numbers are 0-d tensors.

        scaled: fp16's loss scale needs updates that are not finite to be refused, whatever the mode.
        """
        if self._on_host:
            return self._permit_on_host(loss.item(), grad_norm.item(), step, scaled)
        finite = (loss - loss) + (grad_norm - grad_norm) == 0  # inf - inf and NaN - NaN are NaN
        if not self._on:
            return Permit(finite if scaled else torch.ones_like(finite), 0.0, 1.0)
        loss64, norm64 = loss.double(), grad_norm.double()
        verdict, clip = self._decide(TENSORS, loss64, norm64)
        self._take_up(TENSORS, loss64, norm64)
        if not self.heals:
            return Permit(finite if scaled else torch.ones_like(finite), verdict, 1.0)
        limit = self.history.most_norm(step)
        if limit is not None:
            clip = torch.minimum(clip, torch.clamp(limit / norm64, max=1.0))
        if self.history.sits_out(step):
            verdict = torch.full_like(verdict, SAT_OUT)
        return Permit(verdict == FINE, verdict, clip)

    def _permit_on_host(self, loss: float, norm: float, step: int, scaled: bool) -> Permit:
        if not self._on:
            bad = scaled and not (math.isfinite(loss) and math.isfinite(norm))
            return Permit(_NO if bad else _YES, FINE, 1.0)
        verdict, clip = self._decide(FLOATS, loss, norm)
        self._take_up(FLOATS, loss, norm)
        if not self.heals:
            return Permit(_NO if scaled and verdict == NOT_FINITE else _YES, verdict, 1.0)
        limit = self.history.most_norm(step)
        if limit is not None and norm > limit:
            clip = min(clip, limit / norm)
        if self.history.sits_out(step):
            verdict = SAT_OUT
        return Permit(_YES if verdict == FINE else _NO, verdict, clip)

    def _decide(self, ops: Ops, loss: Any, norm: Any) -> Decision:
        if self._seen is not None:
            return decide(ops, self._seen, loss, norm)
        if self._age < EARLIEST:
            return decide(ops, None, loss, norm)
        seen = begin(*self._early[:, : self._age])
        return decide(ops, on_host(seen) if self._on_host else seen, loss, norm, early=True)

    def _take_up(self, ops: Any, loss: Any, norm: Any) -> None:
        if self._seen is not None:
            self._seen = take_up(ops, self._seen, loss, norm)
            return
        self._early[0, self._age], self._early[1, self._age] = loss, norm
        self._age += 1
        if self._age == BURN_IN:
            seen = begin(*self._early)
            self._seen = on_host(seen) if self._on_host else seen

    def usual_norm(self) -> float | None:
        """Of the gradient; None within the burn-in."""
        return None if self._seen is None else math.exp(float(self._seen.norm_mean))

    def would_permit(self, loss: float, norm: float) -> bool:
        """Whether a step with these numbers would be permitted now; nothing is taken up."""
        if self._on_host:
            return bool(self._decide(FLOATS, loss, norm).verdict == FINE)
        numbers = (torch.tensor(x, dtype=torch.float64, device=self._device) for x in (loss, norm))
        return bool((self._decide(TENSORS, *numbers).verdict == FINE).item())

    def review(
        self, *, step: int, loss: float, verdict: int, permitted: bool, expected: bool
    ) -> Alarm | Stop | None:
        """Looks at the row of a step once its numbers have reached the host; see `Review.look`."""
        if verdict != SAT_OUT:
            self.num_refused_in_a_row = 0 if permitted else self.num_refused_in_a_row + 1
        if self.num_refused_in_a_row >= self.rules.max_refused_in_a_row:
            return Stop(
                f"{self.num_refused_in_a_row} updates in a row were refused, up to step {step}: "
                "loss or gradient is not finite whatever the batch.",
                "Lower the learning rate, clip the gradient (clip_norm), or look for values in the data "
                "that are not finite.",
            )
        if not self._on:
            return None
        bears = self.history.bears(step)
        return self.reviewed.look(step=step, loss=loss, verdict=verdict, expected=expected, bears=bears)

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "num_refused_in_a_row": self.num_refused_in_a_row,
            "age": self._age,
            "early": self._early[:, : self._age].tolist() if self._seen is None else [],
            "seen": None if self._seen is None else list(on_host(self._seen)),
            "review": self.reviewed.state_dict(),
            "history": self.history.to_json(),
            "pending": None if self.pending is None else list(self.pending),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, or an earlier version's."""
        self.num_refused_in_a_row = state["num_refused_in_a_row"]
        self.reviewed = Review()
        self._early.fill_(torch.nan)
        self._age, self._seen = state.get("age", 0), None
        if state.get("early"):
            self._early[:, : self._age] = torch.tensor(state["early"], dtype=torch.float64)
        if state.get("seen"):
            seen = Statistics(*state["seen"])
            as_tensor = [torch.tensor(x, dtype=torch.float64, device=self._device) for x in seen]
            self._seen = seen if self._on_host else Statistics(*as_tensor)
        self.reviewed.load_state_dict(state.get("review", {}))
        self.history = History.from_json(state.get("history", []))
        self.pending = Alarm(*state["pending"]) if state.get("pending") else None
