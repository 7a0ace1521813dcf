"""The guard. Permission is decided on the device before an update; review on the host after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surefoot.errors import RecipeError
from surefoot.types import check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Rules that keep a run healthy.

    An update whose loss or gradient norm is not finite is always refused.

    Args:
        max_refused_in_a_row: after that many refused updates in a row the run ends as ``diverged``:
            with the weights fixed and fresh samples each time, the next one will not do better.
            (fp16 begins by refusing about a dozen while it finds its loss scale.)
    """

    max_refused_in_a_row: int = 50

    def __post_init__(self) -> None:
        check_fields(self, "guard")
        if self.max_refused_in_a_row < 1:
            raise RecipeError("guard: max_refused_in_a_row must be at least 1.")

    def build(self) -> Watch:
        """The guard of one run."""
        return Watch(self)


@dataclass(frozen=True, slots=True)
class Stop:
    """A verdict of the review: end the run, and why."""

    reason: str
    fix: str


_YES, _NO = torch.tensor(True), torch.tensor(False)


class Watch:
    """A guard at work: stateless on the device, a few counters on the host."""

    def __init__(self, rules: Guard) -> None:
        self._rules = rules
        self.num_refused_in_a_row = 0

    @staticmethod
    def permit(loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the update may be applied: bool, 0-d, on the device of `loss` (0-d).

        On a CPU numbers are read at once, which costs a tenth of the operations that a device needs.
        """
        if loss.device.type == "cpu":
            return _YES if math.isfinite(loss.item()) and math.isfinite(grad_norm.item()) else _NO
        return (loss - loss) + (grad_norm - grad_norm) == 0  # inf - inf and NaN - NaN are NaN

    def review(self, *, step: int, permitted: bool) -> Stop | None:
        """Looks at the row of a step once its numbers have reached the host."""
        self.num_refused_in_a_row = 0 if permitted else self.num_refused_in_a_row + 1
        if self.num_refused_in_a_row < self._rules.max_refused_in_a_row:
            return None
        return Stop(
            f"{self.num_refused_in_a_row} updates in a row were refused, up to step {step}: "
            "loss or gradient is not finite whatever the batch.",
            "Lower the learning rate, clip the gradient (clip_norm), or look for values in the data "
            "that are not finite.",
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"num_refused_in_a_row": self.num_refused_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.num_refused_in_a_row = state["num_refused_in_a_row"]
