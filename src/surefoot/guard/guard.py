"""What a recipe says of the guard: its rules and budgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from surefoot.errors import RecipeError
from surefoot.types import check_fields


@dataclass(frozen=True, slots=True)
class Guard:
    """Rules that keep a run healthy, and budgets for what is done about it.

    Args:
        mode: ``"heal"``: updates that are not finite or wild are refused, gradients that are unusually long
            shortened, samples that break a step left out, and a run that diverges goes back to a healthy
            state and goes on otherwise. ``"watch"``: says what it would do, and does nothing. ``"off"``.
        max_refused_in_a_row: after that many refused updates in a row the run ends as ``diverged``; below 5
            before it goes back for them.
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
