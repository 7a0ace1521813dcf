"""The guard at work. Permission is decided on the device before an update; review on the host after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.guard.detect import (
    ANY_GROWTH,
    FINE,
    MOST_GROWTH,
    NOT_FINITE,
    SAT_OUT,
    STATISTICS_SPIKE,
    Decision,
)
from surefoot.guard.guard import Guard
from surefoot.guard.history import History
from surefoot.guard.judge import CALM, Judge
from surefoot.guard.layers import Layers
from surefoot.guard.review import Alarm, Review
from surefoot.guard.stop import Stop, refused_for_good


class Permit(NamedTuple):
    """permitted: bool, 0-d, on the device. verdict, clip: see `Decision`; numbers on a CPU, else 0-d."""

    permitted: Tensor
    verdict: float | Tensor
    clip: float | Tensor


_ANY = 1 << 30
_YES, _NO = torch.tensor(True), torch.tensor(False)
_GO = Permit(_YES, 0.0, 1.0)


class Watch:
    """A guard at work.

    history: what it has done to the run: the only part of its state that going back does not undo.
    pending: an alarm that has not been seen to yet. reviewed: what the review has seen. layers: the same of
    single layers. unexplained: the last steps refused for running statistics without samples to blame.
    """

    def __init__(self, rules: Guard, device: torch.device) -> None:
        self.rules = rules
        self.heals = rules.mode == "heal"
        self.history = History()
        self.pending: Alarm | None = None
        self.reviewed = Review()
        self.layers = Layers()
        self.num_refused_in_a_row = 0
        self.unexplained: list[int] = []
        self.on = rules.mode != "off"
        self._device = device
        self.judge = Judge(device)

    def permit(
        self,
        loss: Tensor,
        grad_norm: Tensor,
        growth: Tensor | float | None = None,
        *,
        step: int,
        scaled: bool,
    ) -> Permit:
        """Whether the update of `step` may be applied, and at what length; numbers are 0-d tensors. growth:
        of running statistics, if the model has any; on a CPU a float. scaled: fp16's loss scale needs
        updates that are not finite to be refused, whatever the mode.
        """
        if self.judge.on_host:
            permit = self.permit_on_host(loss.item(), grad_norm.item(), step=step, scaled=scaled)
            if growth is None or not self.on or permit.verdict != FINE or growth <= self.most_growth(step):
                return permit
            return Permit(_NO if self.heals else _YES, STATISTICS_SPIKE, permit.clip)
        self._begin_anew(step)
        most = self.most_growth(step)
        permitted, verdict, clip = self.permit_by(
            self.judge.take, loss, grad_norm, growth, most=most, scaled=scaled
        )
        if isinstance(verdict, Tensor) and isinstance(clip, Tensor):  # it heals
            if (limit := self.history.most_norm(step)) is not None:
                clip = torch.minimum(clip, torch.clamp(limit / grad_norm.double(), max=1.0))
            if self.history.sits_out(step):
                permitted, verdict = torch.zeros_like(permitted), torch.full_like(verdict, SAT_OUT)
        return Permit(permitted, verdict, clip)

    def permit_by(
        self,
        decide: Callable[[Tensor, Tensor], Decision],
        loss: Tensor,
        grad_norm: Tensor,
        growth: Tensor | float | None,
        *,
        most: float,
        scaled: bool,
    ) -> Permit:
        """`permit` on a device by what `decide` makes of loss and norm, where `is_usual`."""
        finite = (loss - loss) + (grad_norm - grad_norm) == 0  # inf - inf and NaN - NaN are NaN
        watched = Permit(finite if scaled else torch.ones_like(finite), 0.0, 1.0)
        if not self.on:
            return watched
        verdict, clip, _ = decide(loss.double(), grad_norm.double())
        if growth is not None:
            spike = (verdict == FINE) & ~(torch.as_tensor(growth).double() <= most)
            verdict = torch.where(spike, STATISTICS_SPIKE, verdict)
        if not self.heals:
            return watched._replace(verdict=verdict)
        return Permit(verdict == FINE, verdict, clip)

    def is_usual(self, step: int) -> bool:
        """Whether a step is decided on by its numbers, and what the judge allows, alone."""
        if not self.on:
            return True
        history = self.history
        if history.interventions and (
            history.sits_out(step)
            or history.begins_anew(step)
            or history.most_norm(step) is not None
            or history.lets_grow(step)
        ):
            return False
        return self.judge.allowed is not None

    def lets_pass(self, step: int) -> tuple[float, float, float]:
        """Loss, norm of the gradient, and growth of running statistics up to which `permit` is certain to
        say yes, on a host, and not to shorten it.
        """
        if not self.on:
            return math.inf, math.inf, math.inf
        loss, norm = self.judge.certain_below()
        if self.heals and self.history.interventions:
            if self.history.sits_out(step) or self.history.begins_anew(step):
                return -math.inf, -math.inf, -math.inf
            limit = self.history.most_norm(step)
            norm = norm if limit is None else min(norm, limit)
        return loss, norm, self.most_growth(step)

    def calm_after(self, num: int, step: int) -> tuple[int, tuple[float, float, float]]:
        """How many steps after `num` more from `step` on, all of them calm, are permitted and raise no
        alarm before the last, if each is within these bounds, those of `lets_pass` then; on a host.
        """
        if not self.on:
            return _ANY, (math.inf, math.inf, math.inf)
        calm, loss, norm = self.judge.calm_after(num)
        calm = 0 if self.history.unsettled(step) else min(calm, self.reviewed.calm_after(num))
        return calm, (loss, norm, self.most_growth(step))

    def fine_for(self, step: int) -> int:
        """How many steps from `step` on, if each is found fine, call for no alarm before the last."""
        if not self.on:
            return _ANY
        return 0 if self.history.unsettled(step) else self.reviewed.calm_for()

    def take_calm(self, step: int, losses: Sequence[float], norms: Sequence[float]) -> Alarm | None:
        """`permit` and `review` of no more steps than `calm_after` allows for; the last is `step`."""
        if self.on:
            self.judge.take_calm(losses, norms)
        return self.review_calm(step, losses)

    def review_calm(self, step: int, losses: Sequence[float]) -> Alarm | None:
        """`review` of no more steps than `fine_for` allows for; the last is `step`."""
        self.num_refused_in_a_row = 0
        return self.reviewed.look_at_calm(step, losses) if self.on else None

    def permit_on_host(self, loss: float, norm: float, *, step: int, scaled: bool) -> Permit:
        """`permit`, with numbers."""
        if self.heals and not self.history.interventions:  # first, and short: this is nearly every step
            decision = self.judge.take(loss, norm)
            if decision is CALM:
                return _GO
            verdict, clip, _ = decision
            return Permit(_YES if verdict == FINE else _NO, verdict, clip)
        if not self.on:
            bad = scaled and not (math.isfinite(loss) and math.isfinite(norm))
            return Permit(_NO if bad else _YES, FINE, 1.0)
        self._begin_anew(step)
        verdict, clip, _ = self.judge.take(loss, norm)
        if not self.heals:
            return Permit(_NO if scaled and verdict == NOT_FINITE else _YES, verdict, 1.0)
        limit = self.history.most_norm(step)
        if limit is not None and norm > limit:
            clip = min(clip, limit / norm)
        if self.history.sits_out(step):
            verdict = SAT_OUT
        return Permit(_YES if verdict == FINE else _NO, verdict, clip)

    def _begin_anew(self, step: int) -> None:
        if self.history.begins_anew(step):
            self.judge = Judge(self._device)

    def usual_norm(self) -> float | None:
        """Of the gradient; None within the burn-in."""
        seen = self.judge.seen
        return None if seen is None else math.exp(float(seen.log_mean))

    def most_growth(self, step: int) -> float:
        """Of running statistics that is permitted in a step. In the first one, which may be with data quite
        unlike those that they are of, any finite one will do.
        """
        first = step == 0 or self.history.begins_anew(step)
        return ANY_GROWTH if first or self.history.lets_grow(step) else MOST_GROWTH

    def would_permit(self, loss: float, norm: float, growth: float, *, step: int) -> bool:
        """Whether a step with these numbers would be permitted now; nothing is taken up."""
        numbers = map(self.judge.tensor_or_float, (loss, norm))
        return growth <= self.most_growth(step) and float(self.judge.decide(*numbers).verdict) == FINE

    def review(
        self, *, step: int, loss: float, verdict: int, permitted: bool, expected: bool
    ) -> Alarm | Stop | None:
        """Looks at the row of a step whose numbers have reached the host; see `Review.look`."""
        if verdict != SAT_OUT:
            self.num_refused_in_a_row = 0 if permitted else self.num_refused_in_a_row + 1
        if self.num_refused_in_a_row >= self.rules.max_refused_in_a_row:
            return refused_for_good(self.num_refused_in_a_row, step, verdict)
        if not self.on:
            return None
        bears = bool(self.history.interventions) and self.history.bears(step)
        if verdict == FINE and not permitted:  # the update is not finite
            verdict, bears = NOT_FINITE, False
        return self.reviewed.look(step=step, loss=loss, verdict=verdict, expected=expected, bears=bears)

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "num_refused_in_a_row": self.num_refused_in_a_row,
            **self.judge.state_dict(),
            "review": self.reviewed.state_dict(),
            "layers": self.layers.state_dict(),
            "history": self.history.to_json(),
            "unexplained": self.unexplained,
            "pending": None if self.pending is None else list(self.pending),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, or an earlier version's."""
        self.num_refused_in_a_row = state["num_refused_in_a_row"]
        self.judge.load_state_dict(state)
        self.unexplained = list(state.get("unexplained", []))
        self.reviewed = Review()
        self.reviewed.load_state_dict(state.get("review", {}))
        self.layers.load_state_dict(state.get("layers", {}))
        self.history = History.from_json(state.get("history", {}))
        self.pending = Alarm(*state["pending"]) if state.get("pending") else None
