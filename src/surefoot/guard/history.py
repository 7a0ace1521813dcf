"""What the guard has done to a run, and what follows from it for each step.

A list of interventions, each with the step from which on it holds. So what holds in a step is a function
of the list and the step: going back to an earlier state needs nothing undone, and a replay of steps that
lie before an intervention sees nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from surefoot.types import Ids

Kind = Literal[
    "quarantine", "release", "rollback", "hold_rate", "cut_rate", "clip", "bear", "anew", "sit_out", "grow"
]


class Intervention(NamedTuple):
    """kind: ``quarantine`` (samples are left out), ``release`` (they come back), ``rollback`` (the run went
    back to `begins`), ``hold_rate`` (the schedule's multiplier is at most `value`), ``cut_rate`` (the rate
    is multiplied by `value`), ``clip`` (the gradient's norm is at most `value`), ``bear`` (before step
    `value` neither a high loss nor what is not finite is an alarm), ``anew`` (what is usual is learned
    anew), ``sit_out`` (all updates before step `value` are refused), ``grow`` (before step
    `value` running statistics are taken as they come). begins: the first step for which it
    holds. at: the step in which it was decided.
    """

    kind: Kind
    begins: int
    at: int
    value: float = 0.0
    ids: tuple[int, ...] = ()


class History:
    """The interventions of a run, in order. num_decided: how many there ever were, forgotten ones too."""

    def __init__(
        self, interventions: tuple[Intervention, ...] = (), num_decided: int | None = None
    ) -> None:
        self.interventions = interventions
        self.num_decided = len(interventions) if num_decided is None else num_decided
        self._spans = self._quarantines()

    def with_(self, *more: Intervention) -> History:
        """With more of them."""
        return History((*self.interventions, *more), self.num_decided + len(more))

    def count(self, kind: Kind, *, since: int = 0) -> int:
        """How many of a kind were decided in step `since` or later."""
        return sum(i.kind == kind and i.at >= since for i in self.interventions)

    def multiplier(self, step: int, scheduled: float) -> float:
        """What the schedule's multiplier becomes."""
        for one in self.interventions:
            if one.begins <= step and one.kind == "hold_rate":
                scheduled = min(scheduled, one.value)
            elif one.begins <= step and one.kind == "cut_rate":
                scheduled *= one.value
        return scheduled

    def most_norm(self, step: int) -> float | None:
        """The gradient's norm is at most this; None: no limit."""
        limits = [i.value for i in self.interventions if i.kind == "clip" and i.begins <= step]
        return min(limits, default=None)

    def sits_out(self, step: int) -> bool:
        """Whether the update of this step is refused, whatever its numbers."""
        return any(i.kind == "sit_out" and i.begins <= step < i.value for i in self.interventions)

    def bears(self, step: int) -> bool:
        """Whether a high loss, and what is not finite, is no alarm in this step."""
        return any(i.kind == "bear" and i.begins <= step < i.value for i in self.interventions)

    def lets_grow(self, step: int) -> bool:
        """Whether running statistics are taken as they come in this step."""
        return any(i.kind == "grow" and i.begins <= step < i.value for i in self.interventions)

    def will_let_grow(self, step: int) -> bool:
        """Whether it was decided before this step that they are, and this step had its batch already."""
        return any(i.kind == "grow" and i.at < step < i.begins for i in self.interventions)

    def blamed(self, step: int) -> bool:
        """Whether samples were found, after this step, that were to blame for it."""
        return any(i.kind == "quarantine" and i.at == step < i.begins for i in self.interventions)

    def unsettled(self, step: int) -> bool:
        """Whether more than samples and rates is otherwise than without the guard, at `step` or later."""
        return any(
            i.kind == "clip"
            or (i.kind in ("sit_out", "bear", "grow") and i.value > step)
            or (i.kind == "anew" and i.begins >= step)
            for i in self.interventions
        )

    def begins_anew(self, step: int) -> bool:
        """Whether what is usual is learned anew from this step on."""
        return any(i.kind == "anew" and i.begins == step for i in self.interventions)

    @property
    def has_holes(self) -> bool:
        """Whether any sample was ever left out."""
        return bool(self._spans)

    def holes(self, step: int, ids: Ids) -> NDArray[np.bool_] | None:
        """Which of these samples (int64[B]) are left out in this step; None: none."""
        if not self._spans:
            return None
        found = np.array([self._left_out(i, step) for i in ids.tolist()])
        return found if found.any() else None

    def quarantined(self, step: int) -> list[int]:
        """Samples that are left out in this step."""
        return sorted(i for i in self._spans if self._left_out(i, step))

    def _left_out(self, sample: int, step: int) -> bool:
        return any(begin <= step < end for begin, end in self._spans.get(sample, ()))

    def _quarantines(self) -> dict[int, list[tuple[int, float]]]:
        """Per sample, from which step to which it is left out."""
        spans: dict[int, list[tuple[int, float]]] = {}
        for one in self.interventions:
            for i in one.ids:
                known = spans.setdefault(i, [])
                if one.kind == "quarantine":
                    known.append((one.begins, math.inf))
                elif one.kind == "release" and known:
                    known[-1] = (known[-1][0], min(known[-1][1], one.begins))
        return spans

    def back_to(self, step: int, at: int, *, forget: int) -> History:
        """After a rollback: what was found out about samples and running statistics holds from there on,
        but for what was found in step `forget` or later, when all went wrong; and alarms that were borne
        are borne again.
        """
        found = ("quarantine", "grow")
        kept = [i for i in self.interventions if i.kind not in found or i.at < forget]
        again = ("quarantine", "bear", "anew", "grow")
        moved = [i._replace(begins=min(i.begins, step)) if i.kind in again else i for i in kept]
        return History((*moved, Intervention("rollback", step, at)), self.num_decided + 1)

    def leads_to(self, now: History, step: int) -> bool:
        """Whether a state after `step` updates with this history lies on the way to `now`."""
        kept, later = self.interventions, now.interventions[len(self.interventions) :]
        kinds = [(i.kind, i.at) for i in kept]
        same = kinds == [(i.kind, i.at) for i in now.interventions[: len(kept)]]
        return same and all(i.begins >= step for i in later if i.kind == "rollback")

    def found_since(self, step: int) -> tuple[int, ...]:
        """Samples that were left out by decisions in `step` or later."""
        found = {x for i in self.interventions if i.kind == "quarantine" and i.at >= step for x in i.ids}
        return tuple(sorted(found))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"decided": self.num_decided, "list": [[*i[:4], list(i.ids)] for i in self.interventions]}

    @staticmethod
    def of(facts: Mapping[str, Any]) -> History:
        """That of a state, of its JSON part; an empty one if that does not tell."""
        return History.from_json(facts.get("stateful", {}).get("guard", {}).get("history", {}))

    @staticmethod
    def from_json(kept: dict[str, Any]) -> History:
        """What `to_json` gave; an empty one is that of a run of an earlier version."""
        rows = kept.get("list", [])
        found = ((kind, begins, at, value, tuple(ids)) for kind, begins, at, value, ids in rows)
        return History(tuple(Intervention(*one) for one in found), kept.get("decided"))
