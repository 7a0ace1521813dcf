"""A state in memory, on its way to the store or from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _nothing_more(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Snapshot:
    """A whole state: tensors by name, and everything else as JSON.

    frozen: tensors that training does not change. finite: names in `model` whose numbers must be finite.
    metrics: of the newest validation. more: computes facts from `model` and `frozen` once they can no
    longer change: what takes time, such as a digest.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]
    frozen: dict[str, Tensor] = field(default_factory=dict)
    finite: frozenset[str] = frozenset()
    metrics: dict[str, float] = field(default_factory=dict)
    more: Callable[[Mapping[str, Tensor]], dict[str, Any]] = _nothing_more

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All, under names that no two share."""
        for part in ("model", "frozen", "optimizer"):
            for name, tensor in getattr(self, part).items():
                yield f"{part}:{name}", tensor

    def copy(self) -> Snapshot:
        """With tensors of its own, where they are."""

        def own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}

        return replace(self, model=own(self.model), frozen=own(self.frozen), optimizer=own(self.optimizer))

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(t.numel() * t.element_size() for _, t in self.tensors())


def is_finite(snapshot: Snapshot) -> bool:
    """Whether the numbers that must be finite are: weights, and what the optimizer keeps for each of them.
    Others may hold what they like: a causal mask is full of -inf, a running maximum begins there.
    """
    watched = [t for name, t in snapshot.model.items() if name in snapshot.finite]
    return all(_all_finite(t) for t in [*watched, *(t for t in snapshot.optimizer.values() if t.ndim)])


def _all_finite(tensor: Tensor) -> bool:
    """By numpy: a parallel kernel of torch, called from the writer's thread, would begin a second pool of
    OpenMP threads, and with more threads than cores the training thread's own no longer spin: all its steps
    from then on take longer (see the lab book).
    """
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if not plain.is_floating_point() or not plain.numel():
        return True
    plain = plain.float() if plain.element_size() == 1 else plain
    flat = plain.detach().contiguous().reshape(-1)
    if flat.element_size() == 2:  # numpy has no bfloat16, and is slow with float16
        exponent = _EXPONENT[flat.dtype]
        bits = flat.view(torch.int16).numpy()
        pieces = (bits[i : i + _PIECE] for i in range(0, len(bits), _PIECE))
        return not any(((piece & exponent) == exponent).any() for piece in pieces)
    numbers = flat.numpy()
    return bool(np.isfinite(numbers.min()) and np.isfinite(numbers.max()))


_EXPONENT = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
"""All ones in the numbers that are not finite."""
_PIECE = 1 << 20
