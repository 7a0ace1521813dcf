"""Rows of a batch made holes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surefoot.types import HOLE, Minibatch, leaves, map_leaves, take_rows


def leave_out(batch: Minibatch, out: NDArray[np.bool_]) -> Minibatch:
    """The batch with these rows made holes. Their weight is zero, and their data become a copy of another
    row's: zero times what is not a number would not be zero.
    """
    slots = batch.slots
    ids = np.where(out, HOLE, slots.ids)
    stay = np.flatnonzero(ids != HOLE)
    rows = np.where(ids == HOLE, stay[0] if len(stay) else 0, np.arange(len(ids)))
    device = next((leaf.device for leaf in leaves(batch.data) if isinstance(leaf, Tensor)), None)
    weights = torch.from_numpy((ids != HOLE).astype(np.float32)).to(device)
    data = take_rows(batch.data, rows, len(ids))
    if not len(stay):
        data = map_leaves(_finite, data)
    return Minibatch(slots._replace(ids=ids, num_samples=len(stay)), data, weights, len(ids))


def _finite(leaf: Any) -> Any:
    """Zeros for what is not finite."""
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return torch.nan_to_num(leaf, nan=0.0, posinf=0.0, neginf=0.0) if floating else leaf
