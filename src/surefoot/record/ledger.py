"""The ledger: a hash chain over the sample ids of every applied update."""

from __future__ import annotations

import hashlib

from surefoot.types import Ids


class Ledger:
    """Proves which samples went into the weights, and in what order.

    ``value`` after an update is BLAKE2b(value before || step || ids), 32 bytes; refused updates leave
    it as it was. Two runs with equal values applied the same updates to the same samples.
    """

    def __init__(self, value: str = "00" * 32) -> None:
        self._value = bytes.fromhex(value)

    @property
    def value(self) -> str:
        """The chain's head, as 64 hexadecimal digits."""
        return self._value.hex()

    def extend(self, step: int, ids: Ids) -> None:
        """Adds an applied update: its step and sample ids, int64[B]."""
        data = self._value + step.to_bytes(8, "little") + ids.tobytes()
        self._value = hashlib.blake2b(data, digest_size=32).digest()
