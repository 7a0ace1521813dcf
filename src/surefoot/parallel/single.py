"""One process: every agreement is with oneself."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class Single:
    """The strategy of a run in one process."""

    def share(self, rows: int) -> slice:
        """All rows."""
        return slice(0, rows)

    def sum(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def reduce_gradients(self, grads: Iterable[Tensor]) -> None:
        """Nothing to add."""

    def agree(self, flag: bool) -> bool:
        """The flag itself."""
        return flag
