"""Whether tensors are finite, by one operation for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from surefoot.optim.gradients import global_norm, norms_of


def can_be_looked_at(value: object) -> bool:
    """Whether torch can: at plain numbers of two bytes or more."""
    if type(value) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(value, Tensor)
    plain = value.layout is torch.strided and value.numel() > 0 and value.element_size() > 1
    return plain and (value.is_floating_point() or value.is_complex())


def are_finite(values: Iterable[object], device: torch.device) -> bool:
    """Whether all numbers are, of tensors on a device that can be looked at."""
    return all(map(math.isfinite, _suspects(values, device)))


def have_nan(values: Iterable[object], device: torch.device) -> bool:
    """Whether any number is NaN; infinite ones may be meant, as in masks."""
    return any(map(math.isnan, _suspects(values, device)))


def unsound(frozen: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> set[str]:
    """Names of weights that are not trained, and of running statistics, that hold what they should not."""
    bad = {name for name, value in frozen.items() if have_nan([value], value.device)}
    return bad | {name for name, value in statistics.items() if not are_finite([value], value.device)}


def _suspects(values: Iterable[object], device: torch.device) -> list[float]:
    """The largest number of each; none, if a norm that overflows sooner tells that they are finite."""
    seen = [
        v.detach() for v in values if isinstance(v, Tensor) and can_be_looked_at(v) and v.device == device
    ]
    if not seen or math.isfinite(global_norm(seen).item()):
        return []
    return [float(largest) for largest in norms_of(seen, math.inf).tolist()]
