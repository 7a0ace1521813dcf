"""Watching a validation metric: has it stopped improving?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from surefoot.errors import RecipeError
from surefoot.types import check_fields


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Ends the run, with status ``stopped_early``, when a validation metric stops improving.

    Args:
        metric: name of a validation metric; ``"loss"`` is always there.
        patience: that many validations in a row without improvement end the run.
        mode: whether smaller (``"min"``) or larger (``"max"``) is better.
        min_delta: by how much a value must be better to count.
    """

    metric: str = "loss"
    patience: int = 5
    mode: Literal["min", "max"] = "min"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "early_stopping")
        if self.patience < 1 or self.min_delta < 0:
            raise RecipeError(
                "early_stopping needs patience >= 1 and min_delta >= 0; got "
                f"{self.patience} and {self.min_delta}."
            )


class Patience:
    """Counts validations since the last improvement. A value that is no number never improves."""

    def __init__(self, *, patience: int, mode: str, min_delta: float) -> None:
        self._patience, self._sign, self._delta = patience, -1 if mode == "max" else 1, min_delta
        self.best: float | None = None
        self.num_bad = 0

    def spent(self, value: float) -> bool:
        """Takes the next value; whether patience is exhausted by it. If so, it starts anew."""
        score = self._sign * value
        if not math.isnan(score) and (self.best is None or score < self.best - self._delta):
            self.best, self.num_bad = score, 0
            return False
        self.num_bad += 1
        if self.num_bad <= self._patience:
            return False
        self.num_bad = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"best": self.best, "num_bad": self.num_bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.best, self.num_bad = state["best"], state["num_bad"]
