"""The order of samples: a keyed permutation of ``range(n)`` with no state, in memory of order sqrt(n).

For n above 65,536 it is a generalised Feistel network on Z_a x Z_b with a = ceil(sqrt n) and
b = ceil(n / a), twelve rounds, and cycle-walking back into range (Black & Rogaway, "Ciphers with
arbitrary finite domains", 2002). Below, the stable argsort of hashed positions: exactly uniform up
to the quality of the hash, which a Feistel network on a tiny domain is not. Both are named by
`ALGORITHM`, which is recorded in each run; golden vectors in the tests pin it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from surefoot.keys import M1, M2, U64, Words, key, words
from surefoot.types import Ids

ALGORITHM = "argsort-feistel12-v1"
_ROUNDS = 12
_SMALL = 1 << 16
_CHUNK = 1 << 16
_BLOCK = 1 << 14  # of a chunk that is computed at once, to stay in a cache
_TABLED = 1 << 14  # values of a half up to which their hashes are looked up


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
        keys = words(base, np.arange(_ROUNDS, dtype=np.uint64))
        self._keys = keys ^ (keys >> U64(30))
        self._hashes: list[Words] = []
        if self._a <= _TABLED:
            moduli = [(self._b, self._a), (self._a, self._b)] * (_ROUNDS // 2)
            self._hashes = [
                self._hash(i, np.arange(num, dtype=np.uint64), modulus)
                for i, (num, modulus) in enumerate(moduli)
            ]

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
        words_ = np.asarray(x, np.int64).view(np.uint64)
        out = np.empty_like(words_)
        for i in range(0, len(x), _BLOCK):
            out[i : i + _BLOCK] = once(words_[i : i + _BLOCK])
        outside = np.flatnonzero(out >= U64(self.n))
        while outside.size:
            out[outside] = once(out[outside])
            outside = outside[out[outside] >= U64(self.n)]
        return out.view(np.int64)

    def _forward(self, x: Words) -> Words:
        left = x // U64(self._b)
        right = x - left * U64(self._b)
        for i in range(0, _ROUNDS, 2):
            self._add(left, i, right, self._a)
            self._add(right, i + 1, left, self._b)
        return left * U64(self._b) + right

    def _backward(self, x: Words) -> Words:
        left = x // U64(self._b)
        right = x - left * U64(self._b)
        for i in range(_ROUNDS - 2, -1, -2):
            right += U64(self._b)
            right -= self._hash(i + 1, left, self._b)
            np.minimum(right, right - U64(self._b), out=right)
            left += U64(self._a)
            left -= self._hash(i, right, self._a)
            np.minimum(left, left - U64(self._a), out=left)
        return left * U64(self._b) + right

    def _add(self, half: Words, i: int, other: Words, modulus: int) -> None:
        half += self._hash(i, other, modulus)
        np.minimum(half, half - U64(modulus), out=half)  # wraps to a large number if it is below

    def _hash(self, i: int, half: Words, modulus: int) -> Words:
        """Keyed hash of one half, reduced to ``range(modulus)`` by multiply-high; both below 2**30.

        This is ``((mix(half ^ key) >> 32) * modulus) >> 32``, with the first step of `mix` taken with the
        key: of what it shifts by 30 nothing is left of a half.
        """
        if self._hashes:
            return np.take(self._hashes[i], half.view(np.int64), mode="wrap")
        x: Words = half ^ self._keys[i]
        x *= M1
        x ^= x >> U64(27)
        x *= M2
        x ^= x >> U64(31)
        x >>= U64(32)
        x *= U64(modulus)
        x >>= U64(32)
        return x


class Order:
    """Sample ids by (epoch, position), from a small cache of aligned chunks.

    The cache changes speed only: `take` is a pure function of its arguments.
    """

    def __init__(self, n: int, *, seed: int, shuffle: bool) -> None:
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self._permutations: OrderedDict[int, Permutation] = OrderedDict()
        self._chunks: OrderedDict[tuple[int, int], Ids] = OrderedDict()

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
            stop = min((index + 1) * _CHUNK, self.n)
            positions = np.arange(index * _CHUNK, stop, dtype=np.int64)
            found = self._chunks[epoch, index] = self.permutation(epoch)(positions)
            found.flags.writeable = False
            if len(self._chunks) > 4:
                self._chunks.popitem(last=False)
        return found

    def permutation(self, epoch: int) -> Permutation:
        """The permutation of one epoch."""
        found = self._permutations.get(epoch)
        if found is None:
            base = key(self.seed, "order", epoch)
            found = self._permutations[epoch] = Permutation(self.n, base)
            if len(self._permutations) > 2:
                self._permutations.popitem(last=False)
        return found
