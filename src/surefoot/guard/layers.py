"""Layers whose gradient vanishes, explodes or is zero: told of, not acted upon.

Judged on the root mean square of each weight's gradient, relative to the largest of all: in a network that
learns these lie within some powers of ten of each other, while in one whose signal dies or grows by a
constant factor per layer they differ exponentially in depth (Hochreiter 1991; Pascanu et al. 2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

_SPREAD = 1e-6
_LOOKS, _LOOKS_AT_ZERO = 3, 10
"""In a row. Parts that are seldom used, such as experts, have no gradient in many batches."""


class Layer(NamedTuple):
    """A weight: its name in the model, its place among what is trained, how many numbers it holds."""

    name: str
    place: int
    size: int


def layers_of(model: nn.Module, trained: Sequence[nn.Parameter]) -> list[Layer]:
    """The weights among the parameters that are trained: those that a layer multiplies by."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        Layer(names[id(p)], place, p.numel())
        for place, p in enumerate(trained)
        if p.ndim > 1 and id(p) in names
    ]


class Sick(NamedTuple):
    """how: ``vanishes``, ``explodes`` or ``is zero``."""

    layer: str
    how: str
    reason: str


@dataclass
class Layers:
    """Call `look` every so often. seen: how often in a row each was found sick. told: those that were."""

    seen: dict[str, int] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def look(self, names: Sequence[str], rms: Sequence[float]) -> list[Sick]:
        """Those that have been found sick often enough in a row now; each is told of once.

        Args:
            names: of the weights, as the model has them: from input to output, mostly.
            rms: root mean square of the gradient of each.
        """
        found = _sick(names, rms) if all(map(math.isfinite, rms)) else []
        self.seen = {f"{s.layer} {s.how}": 1 + self.seen.get(f"{s.layer} {s.how}", 0) for s in found}
        now = [s for s in found if self._often(s) and s.layer not in self.told]
        self.told += [s.layer for s in now]
        return now

    def _often(self, sick: Sick) -> bool:
        least = _LOOKS_AT_ZERO if sick.how == "is zero" else _LOOKS
        return self.seen[f"{sick.layer} {sick.how}"] >= least

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"seen": dict(self.seen), "told": list(self.told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, or an earlier version's."""
        self.seen, self.told = dict(state.get("seen", {})), list(state.get("told", []))


def _sick(names: Sequence[str], rms: Sequence[float]) -> list[Sick]:
    if len(rms) < 2 or max(rms) == 0:
        return []
    largest = max(range(len(rms)), key=rms.__getitem__)
    zero = [Sick(name, "is zero", "none of it moves") for name, x in zip(names, rms, strict=True) if x == 0]
    small = [i for i, x in enumerate(rms) if 0 < x < _SPREAD * rms[largest]]
    if not small:
        return zero
    least = min(small, key=rms.__getitem__)
    told = f"rms {rms[least]:.3g} in {names[least]}, {rms[largest]:.3g} in {names[largest]}"
    if least > largest:  # it grows on its way back to the input
        return [*zero, Sick(names[largest], "explodes", told)]
    return [*zero, *(Sick(names[i], "vanishes", told) for i in small if i < largest)]
