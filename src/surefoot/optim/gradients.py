"""Gradient transforms: specs that are their own implementation. Applied once per update, after
accumulation and unscaling, in the order given.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surefoot.errors import RecipeError
from surefoot.types import check_fields

_SINGLE = struct.Struct("@f")  # the machine's: what is too large becomes infinite


def rounded(number: float) -> float:
    """To single precision. Of a sum, a product or a quotient of such numbers in double precision this is
    what single precision gives: it has more than twice the digits (Figueroa 1995).
    """
    single: float = _SINGLE.unpack(_SINGLE.pack(number))[0]
    return single


def _single(number: float) -> Tensor:
    return torch.scalar_tensor(number, dtype=torch.float32, device="cpu")


_LITTLE = rounded(1e-6)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm of all elements: 0-d. Summed per tensor and then over tensors, as torch does."""
    norm: Tensor = torch.linalg.vector_norm(norms_of(tensors))
    return norm


def norms_of(tensors: Sequence[Tensor], order: float = 2) -> Tensor:
    """2-norm of each, or another: 1-d."""
    if torch.compiler.is_compiling():  # torch._foreach_norm would stay a call into Python
        return torch.stack([torch.linalg.vector_norm(t, order) for t in tensors])
    return torch.stack(list(torch._foreach_norm(list(tensors), order)))


@dataclass(frozen=True, slots=True)
class ClipNorm:
    """Scales all gradients so that their global 2-norm is at most `max_norm` (Pascanu et al. 2013);
    the same bits as ``torch.nn.utils.clip_grad_norm_``.
    """

    max_norm: float

    def __post_init__(self) -> None:
        check_fields(self, "clip_norm")
        if not self.max_norm > 0:
            raise RecipeError(f"clip_norm({self.max_norm}) must be above zero.")

    def __call__(self, grads: Sequence[Tensor], norm: Tensor) -> Tensor:
        """Clips `grads` in place; returns the norm after it."""
        if norm.is_cpu and norm.dtype == torch.float32 and not torch.compiler.is_compiling():
            before = norm.item()
            times = self._times(before)
            if times >= 1.0:
                return norm
            factor, after = _single(times), _single(before * times)
        else:
            factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            after = norm * factor
        torch._foreach_mul_(list(grads), factor)
        return after

    def _times(self, norm: float) -> float:
        """``max_norm / (norm + 1e-6)`` as torch rounds it in single precision, where it multiplies by the
        reciprocal; in Python's numbers, which takes a fraction of the time.
        """
        reciprocal = rounded(1.0 / rounded(norm + _LITTLE))
        return rounded(reciprocal * rounded(self.max_norm))


@dataclass(frozen=True, slots=True)
class ClipValue:
    """Clamps each element of the gradients to [-limit, limit]."""

    limit: float

    def __post_init__(self) -> None:
        check_fields(self, "clip_value")
        if not self.limit > 0:
            raise RecipeError(f"clip_value({self.limit}) must be above zero.")

    def __call__(self, grads: Sequence[Tensor], norm: Tensor) -> None:
        """Clamps `grads` in place."""
        torch._foreach_clamp_max_(list(grads), self.limit)
        torch._foreach_clamp_min_(list(grads), -self.limit)


clip_norm = ClipNorm
clip_value = ClipValue
