"""Rows of arrays, gathered into memory that is used again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surefoot.types import Ids

_BUFFERS = 3


class Pool:
    """Gathers rows of arrays into memory used before, where no tensor refers to it any more: fresh memory
    takes about as long as what is written into it.

    Args:
        most: rows that are gathered at once.
    """

    def __init__(self, arrays: list[Tensor], most: int) -> None:
        self._arrays, self._most = _Memory(arrays), most
        self._kept: deque[_Memory] = deque(maxlen=_BUFFERS)

    def gather(self, ids: Ids) -> list[Tensor]:
        """Rows of each array, in memory that is used again once nobody has any of it."""
        num, index = len(ids), torch.from_numpy(ids)
        into = next((kept for kept in self._kept if kept.is_free()), None)
        if into is None:
            any_row = torch.zeros(self._most, dtype=torch.int64)  # whatever kind of tensor it is
            into = _Memory([t.index_select(0, any_row) for t in self._arrays.tensors])
            self._kept.append(into)
        found = [t[:num] for t in into.tensors]
        by_numpy = torch.get_num_threads() == 1  # which is faster then
        self._arrays.follow()
        each = zip(self._arrays.tensors, self._arrays.rows, found, into.rows, strict=True)
        for tensor, rows, out, out_rows in each:
            if by_numpy and rows is not None and out_rows is not None:
                np.take(rows, ids, axis=0, out=out_rows[:num], mode="clip")
            else:
                torch.index_select(tensor, 0, index, out=out)
        return found


class _Memory:
    """Tensors, and the rows of each as bytes."""

    _places: Sequence[int] = ()
    rows: Sequence[NDArray[np.uint8] | None] = ()

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.follow()
        self._own_uses = [_uses(t) for t in tensors]

    def follow(self) -> None:
        """Takes up that memory has moved, as `share_memory_` moves it, and a queue of processes does."""
        now = [t.data_ptr() for t in self.tensors]
        if now != self._places:
            self._places, self.rows = now, [_bytes(t) for t in self.tensors]

    def is_free(self) -> bool:
        """Whether no other tensor, view or array, nor a graph of autograd, nor another process, has the
        memory of any of these.
        """
        if any(t.untyped_storage().is_shared() for t in self.tensors):
            return False
        return [_uses(t) for t in self.tensors] == self._own_uses


def _uses(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> NDArray[np.uint8] | None:
    """A tensor's rows as bytes, uint8[N, bytes of a row], in its own memory, if they lie there in a row."""
    plain = type(tensor) is Tensor and tensor.is_contiguous() and tensor.numel()
    if not plain or tensor.is_conj() or tensor.is_neg():
        return None
    in_a_row = tensor.as_strided((tensor.numel(),), (1,))  # of one element, strides may be anything
    return in_a_row.view(torch.uint8).numpy().reshape(len(tensor), -1)
