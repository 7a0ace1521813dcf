"""Bringing device numbers to the host without making the loop wait for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
RowNumbers = Sequence[Tensor | float] | Tensor
"""0-d tensors and numbers, or one tensor of them."""


class Readings(Generic[T]):
    """A queue of device scalars on their way to the host.

    On a CPU they arrive at once. On a GPU each set is copied to pinned memory behind the work that
    makes it, and is read `LAG` updates later: a fixed number, so that whatever is decided on it is
    decided at the same step in every repetition of the run. lag: 0 on a CPU, else `LAG`.
    """

    LAG = 8

    def __init__(self, device: torch.device) -> None:
        self.lag = 0 if device.type == "cpu" else self.LAG
        self._cuda = device.type == "cuda"
        self._queue: deque[tuple[T, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, label: T, numbers: RowNumbers) -> Iterable[tuple[T, list[float]]]:
        """Adds a set of 0-d tensors and numbers, or one from `pack`; gives back those sets whose turn
        has come.
        """
        if self.lag == 0:
            return ((label, floats(numbers)),)
        packed = numbers if isinstance(numbers, Tensor) else pack(numbers)
        device, arrived = packed.device, None
        if self._cuda:
            packed = packed.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(device))
        self._queue.append((label, packed, arrived))
        return self._read(leave=self.lag)

    def rest(self) -> Iterable[tuple[T, list[float]]]:
        """All that is still under way; waits for the device."""
        return self._read(leave=0)

    def _read(self, *, leave: int) -> Iterator[tuple[T, list[float]]]:
        while len(self._queue) > leave:
            label, packed, arrived = self._queue.popleft()
            if arrived is not None:
                arrived.synchronize()
            yield label, packed.tolist()


def floats(numbers: RowNumbers) -> list[float]:
    """Their values now; waits for a device."""
    return [number if type(number) is float else float(number) for number in numbers]


def pack(numbers: Sequence[Tensor | float]) -> Tensor:
    """0-d tensors of one device, and numbers, as float64[n] there; nothing waits for it."""
    device = next(number.device for number in numbers if isinstance(number, Tensor))

    def double(number: Tensor | float) -> Tensor:
        if isinstance(number, Tensor):
            return number.double()
        return torch.full((), number, dtype=torch.float64, device=device)  # a copy would wait

    return torch.stack(list(map(double, numbers)))
