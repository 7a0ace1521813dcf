"""The order of samples: a keyed permutation of ``range(n)`` with no state and O(1) memory.

For n above 65,536 it is a generalised Feistel network on Z_a x Z_b with a = ceil(sqrt n) and
b = ceil(n / a), twelve rounds, and cycle-walking back into range (Black & Rogaway, "Ciphers with
arbitrary finite domains", 2002). Below, the stable argsort of hashed positions: exactly uniform up
to the quality of the hash, which a Feistel network on a tiny domain is not. Both are named by
`ALGORITHM`, which is recorded in each run; golden vectors in the tests pin it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from surefoot.keys import U64, Words, key, mix, words
from surefoot.types import Ids

ALGORITHM = "argsort-feistel12-v1"
_ROUNDS = 12
_SMALL = 1 << 16
_CHUNK = 1 << 16
_AHEAD = 1 << 12
"""Samples of an epoch from which on the next chunk is made in another thread."""


class Permutation:
    """A bijection on ``range(n)`` chosen by a key."""

    def __init__(self, n: int, base: int) -> None:
        self.n = n
        self._base = base
        if n <= _SMALL:
            hashed = words(base, np.arange(n, dtype=np.uint64))
            self._table: Ids | None = np.argsort(hashed, kind="stable").astype(np.int64)
            return
        self._table = None
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        self._keys = words(base, np.arange(_ROUNDS, dtype=np.uint64))

    def __call__(self, positions: Ids) -> Ids:
        """Sample ids at positions of the epoch: int64[k] -> int64[k]."""
        if self._table is not None:
            return self._table[positions]
        return self._walk(positions, self._forward)

    def inverse(self, ids: Ids) -> Ids:
        """Positions at which sample ids stand: int64[k] -> int64[k]."""
        if self._table is not None:
            where = np.empty_like(self._table)
            where[self._table] = np.arange(self.n, dtype=np.int64)
            return where[ids]
        return self._walk(ids, self._backward)

    def _walk(self, x: Ids, once: Callable[[Words], Words]) -> Ids:
        out = once(x.astype(np.uint64))
        outside = np.flatnonzero(out >= U64(self.n))
        while outside.size:
            out[outside] = once(out[outside])
            outside = outside[out[outside] >= U64(self.n)]
        return out.astype(np.int64)

    def _forward(self, x: Words) -> Words:
        left, right = np.divmod(x, U64(self._b))
        for i in range(0, _ROUNDS, 2):
            left = (left + self._round(i, right, self._a)) % U64(self._a)
            right = (right + self._round(i + 1, left, self._b)) % U64(self._b)
        return left * U64(self._b) + right

    def _backward(self, x: Words) -> Words:
        left, right = np.divmod(x, U64(self._b))
        for i in range(_ROUNDS - 2, -1, -2):
            right = (right + U64(self._b) - self._round(i + 1, left, self._b)) % U64(self._b)
            left = (left + U64(self._a) - self._round(i, right, self._a)) % U64(self._a)
        return left * U64(self._b) + right

    def _round(self, i: int, half: Words, modulus: int) -> Words:
        """Keyed hash of one half, reduced to ``range(modulus)`` by multiply-high; modulus < 2**32."""
        return ((mix(half ^ self._keys[i]) >> U64(32)) * U64(modulus)) >> U64(32)


class Order:
    """Sample ids by (epoch, position), from a small cache of aligned chunks.

    The cache, and a thread that makes the next chunk while one is read, change speed only: `take` is a pure
    function of its arguments.
    """

    def __init__(self, n: int, *, seed: int, shuffle: bool) -> None:
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self._permutations: OrderedDict[int, Permutation] = OrderedDict()
        self._chunks: OrderedDict[tuple[int, int], Ids] = OrderedDict()
        self._ahead: threading.Thread | None = None
        self._made: dict[tuple[int, int], Ids] = {}

    def take(self, epoch: int, start: int, stop: int) -> Ids:
        """Ids at positions ``start..stop`` of an epoch: int64[stop - start]."""
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        first, last = start // _CHUNK, (stop - 1) // _CHUNK
        if first == last:
            return self._chunk(epoch, first)[start - first * _CHUNK : stop - first * _CHUNK]
        joined = np.concatenate([self._chunk(epoch, c) for c in range(first, last + 1)])
        return joined[start - first * _CHUNK : stop - first * _CHUNK]

    def _chunk(self, epoch: int, index: int) -> Ids:
        found = self._chunks.get((epoch, index))
        if found is None:
            if self._ahead is not None:  # in a forked process it never ends, and counts as ended
                self._ahead.join()
            made = self._made.pop((epoch, index), None)
            found = self._chunks[epoch, index] = self._make(epoch, index) if made is None else made
            if len(self._chunks) > 4:
                self._chunks.popitem(last=False)
            if self.n >= _AHEAD:
                last = (index + 1) * _CHUNK >= self.n
                self._make_ahead(*((epoch + 1, 0) if last else (epoch, index + 1)))
        return found

    def _make(self, epoch: int, index: int) -> Ids:
        stop = min((index + 1) * _CHUNK, self.n)
        made = self.permutation(epoch)(np.arange(index * _CHUNK, stop, dtype=np.int64))
        made.flags.writeable = False
        return made

    def _make_ahead(self, epoch: int, index: int) -> None:
        """Has a chunk made by a thread, which ends with it: so nothing is to be closed."""

        def make() -> None:
            self._made[epoch, index] = self._make(epoch, index)

        self._made.clear()
        self._ahead = threading.Thread(target=make)
        self._ahead.start()

    def permutation(self, epoch: int) -> Permutation:
        """The permutation of one epoch."""
        found = self._permutations.get(epoch)
        if found is None:
            base = key(self.seed, "order", epoch)
            found = self._permutations[epoch] = Permutation(self.n, base)
            if len(self._permutations) > 2:
                self._permutations.popitem(last=False)
        return found
