"""The ledger: a hash chain over the sample ids of every applied update, and where the run went back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from surefoot.types import Ids

EMPTY = "00" * 32


class Branch(NamedTuple):
    """A run went back: after `left` attempted updates, to the state after `begins`, whose ledger is
    `ledger`; None: an earlier version did not keep it.
    """

    left: int
    begins: int
    ledger: str | None


class Segment(NamedTuple):
    """A stretch of a run's lineage, between two places where it went back.

    Steps `begins` up to, not including, `ends` were taken in it; None: it goes on. Of them the weights hold
    those before `kept` (none, if that is `begins`); None: all. ledger: the chain's head where it begins;
    None: an earlier version did not keep it.
    """

    begins: int
    ends: int | None
    kept: int | None
    ledger: str | None


class Ledger:
    """Proves which samples went into the weights, and in what order.

    ``value`` after an update is BLAKE2b(value before || step || ids), 32 bytes; refused updates leave
    it as it was. Two runs with equal values applied the same updates to the same samples: one of them may
    have gone back, which ``branches`` tell.
    """

    def __init__(self, value: str = EMPTY, branches: Sequence[Branch] = ()) -> None:
        self._value = bytes.fromhex(value)
        self.branches = tuple(branches)

    @property
    def value(self) -> str:
        """The chain's head, as 64 hexadecimal digits."""
        return self._value.hex()

    def to_json(self) -> dict[str, Any]:
        """As the state keeps it."""
        return {"ledger": self.value, "branches": [list(branch) for branch in self.branches]}

    def extend(self, step: int, ids: Ids) -> None:
        """Adds an applied update: its step and sample ids, int64[B]."""
        data = self._value + step.to_bytes(8, "little") + ids.tobytes()
        self._value = hashlib.blake2b(data, digest_size=32).digest()

    def back_to(self, begins: int, value: str, *, left: int) -> Ledger:
        """That of a run that went back, after `left` updates, to the state after `begins` with `value`."""
        return Ledger(value, (*self.branches, Branch(left, begins, value)))


def segments(branches: Sequence[Branch]) -> list[Segment]:
    """The lineage of a run that went back so, oldest segment first; one, if it never did."""
    begins = [Branch(0, 0, EMPTY), *branches]
    ends: list[int | None] = [*(branch.left for branch in branches), None]
    found: list[Segment] = []
    least: int | None = None  # that a later segment begins with
    for (_, first, ledger), end in zip(reversed(begins), reversed(ends), strict=True):
        kept = None if end is None or least is None else max(first, min(end, least))
        found.append(Segment(first, end, kept, ledger))
        least = first if least is None else min(least, first)
    return found[::-1]


def ledgers(at: Collection[int], ids: Callable[[int], Ids], permitted: Sequence[bool]) -> dict[int, str]:
    """The ledger after so many attempted updates, made again.

    Args:
        at: numbers of updates.
        ids: step to sample ids, int64[B].
        permitted: of each step, whether its update was applied; steps that lie beyond are not told.
    """
    ledger, found = Ledger(), {0: EMPTY}
    for step in range(min(max(at, default=0), len(permitted))):
        if permitted[step]:
            ledger.extend(step, ids(step))
        if step + 1 in at:
            found[step + 1] = ledger.value
    return {number: found[number] for number in at if number in found}
