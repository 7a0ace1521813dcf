"""Learning rates that lie on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer


class DeviceRates:
    """Rates of an optimizer that reads them on its device: one that was captured can be launched at others.
    In single precision, in which its kernels take them.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer, groups = optimizer, optimizer.param_groups
        device = groups[0]["params"][0].device
        self._base = torch.empty(len(groups), dtype=torch.float64, device=device)
        self._multiplier = torch.empty((), dtype=torch.float64, device=device)
        self._rates = torch.empty(len(groups), dtype=torch.float32, device=device)
        self._written: tuple[float, Sequence[float]] | None = None
        for group in groups:
            if "capturable" in group:  # or Adam refuses to be captured
                group["capturable"] = True
        optimizer._warned_capturable_if_run_uncaptured = True

    def write(self, multiplier: float, base: Sequence[float]) -> None:
        """What `set` multiplies."""
        if self._written is None or self._written[1] is not base:
            for place, lr in zip(self._base, base, strict=True):
                place.fill_(lr)
        if self._written is None or self._written[0] != multiplier:
            self._multiplier.fill_(multiplier)
        self._written = multiplier, base

    def set(self) -> None:
        """Sets the rates."""
        torch.mul(self._base, self._multiplier, out=self._rates)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
