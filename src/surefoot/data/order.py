"""The order of samples: a keyed permutation of ``range(n)`` with no state, in memory of order sqrt(n):
of an epoch, 400 bytes times that, less above 2.7e8.

For n above 65,536 it is a generalised Feistel network on Z_a x Z_b with a = ceil(sqrt n) and
b = ceil(n / a), twelve rounds, and cycle-walking back into range (Black & Rogaway, "Ciphers with
arbitrary finite domains", 2002). Below, the stable argsort of hashed positions: exactly uniform up
to the quality of the hash, which a Feistel network on a tiny domain is not. Both are named by
`ALGORITHM`, which is recorded in each run; golden vectors in the tests pin it.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from surefoot.data.meanwhile import Meanwhile
from surefoot.keys import M1, M2, U64, Words, key, words
from surefoot.types import Ids

ALGORITHM = "argsort-feistel12-v1"
_ROUNDS = 12
_SMALL = 1 << 16
_CHUNK = 1 << 16
_BLOCK = 1 << 14  # of a chunk that is computed at once, to stay in a cache
_TABLED = 1 << 14  # values of a half up to which their hashes are looked up
_WORTH_WHILE = 1 << 13  # samples: with fewer there is little to gain by another thread


class Permutation:
    """A bijection on ``range(n)`` chosen by a key."""

    def __init__(self, n: int, base: int) -> None:
        self.n = n
        self._base = base
        if n <= _SMALL:
            hashed = words(base, np.arange(n, dtype=np.uint64))
            self._table: Ids | None = sorting(hashed)
            return
        self._table = None
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        keys = words(base, np.arange(_ROUNDS, dtype=np.uint64))
        self._keys = keys ^ (keys >> U64(30))
        self._moduli = [(self._b, self._a), (self._a, self._b)] * (_ROUNDS // 2)
        self._tables: list[Words] = []
        if self._a <= _TABLED:
            for i, (num, _) in enumerate(self._moduli):
                hashed = self._computed(i, np.arange(num, dtype=np.uint64))
                self._tables.append(np.tile(hashed, (i + 1) // 2 + 1))

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

    def _walk(self, x: Ids, once: Callable[[Words, Words], None]) -> Ids:
        out = np.array(x, np.int64).view(np.uint64)
        memory = np.empty((3, min(len(out), _BLOCK)), np.uint64)
        for i in range(0, len(out), _BLOCK):
            block = out[i : i + _BLOCK]
            once(block, memory[:, : len(block)])
        outside = np.flatnonzero(out >= U64(self.n))
        while outside.size:
            again = out[outside]
            once(again, np.empty((3, len(again)), np.uint64))
            out[outside] = again
            outside = outside[again >= U64(self.n)]
        return out.view(np.int64)

    def _forward(self, x: Words, memory: Words) -> None:
        left, right, hashed = memory
        _divide(x, self._b, left, right)
        for i in range(0, _ROUNDS, 2):
            left += self._hash(i, right, hashed)
            right += self._hash(i + 1, left, hashed)
        self._join(left, right, x, hashed)

    def _backward(self, x: Words, memory: Words) -> None:
        left, right, hashed = memory
        _divide(x, self._b, left, right)
        for i in range(_ROUNDS - 2, -1, -2):
            right += U64(self._b) - self._hash(i + 1, left, hashed)
            left += U64(self._a) - self._hash(i, right, hashed)
        self._join(left, right, x, hashed)

    def _join(self, left: Words, right: Words, out: Words, memory: Words) -> None:
        _reduce(left, self._a, memory)
        _reduce(right, self._b, memory)
        np.multiply(left, U64(self._b), out=out)
        out += right

    def _hash(self, i: int, half: Words, out: Words) -> Words:
        """Hash of one half in a round, to be added to the other. Halves grow by it, and are reduced at the
        end: each table goes on for as far as its half can have grown by then, forwards; backwards it wraps.
        Without tables `half` is reduced first, in place.
        """
        if self._tables:
            return np.take(self._tables[i], half.view(np.int64), out=out, mode="wrap")
        modulus = U64(self._moduli[i][0])  # to which one hash has been added since the last time
        np.minimum(half, np.subtract(half, modulus, out=out), out=half)  # wraps to a large number if below
        return self._computed(i, half, out)

    def _computed(self, i: int, half: Words, out: Words | None = None) -> Words:
        """Keyed hash of one half, reduced to ``range(modulus)`` by multiply-high; both below 2**30.

        This is ``((mix(half ^ key) >> 32) * modulus) >> 32``, with the first step of `mix` taken with the
        key: of what it shifts by 30 nothing is left of a half.
        """
        x: Words = np.bitwise_xor(half, self._keys[i], out=out)
        x *= M1
        x ^= x >> U64(27)
        x *= M2
        x ^= x >> U64(31)
        x >>= U64(32)
        x *= U64(self._moduli[i][1])
        x >>= U64(32)
        return x


def _divide(x: Words, by: int, quotient: Words, rest: Words) -> None:
    np.floor_divide(x, U64(by), out=quotient)
    np.multiply(quotient, U64(by), out=rest)
    np.subtract(x, rest, out=rest)


def _reduce(x: Words, modulus: int, memory: Words) -> None:
    np.floor_divide(x, U64(modulus), out=memory)
    memory *= U64(modulus)
    x -= memory


def sorting(hashes: Words) -> Ids:
    """``argsort(hashes, kind="stable")``, digit by digit from the lower end, of 16 bits each: numpy sorts
    those in linear time. The last digit is left out, and looked at only if two agree in all others.
    """
    order = np.arange(len(hashes))
    for shift in (16, 32, 48):
        digits = (hashes[order] >> U64(shift)).astype(np.uint16)
        order = order[np.argsort(digits, kind="stable")]
    seen = hashes[order] >> U64(16)
    if (seen[1:] == seen[:-1]).any():
        return np.argsort(hashes, kind="stable").astype(np.int64, copy=False)
    return order.astype(np.int64, copy=False)


class Order:
    """Sample ids by (epoch, position), from a small cache of aligned chunks.

    The cache changes speed only: `take` is a pure function of its arguments. Threads may ask at once: at
    worst both make the same.
    """

    def __init__(self, n: int, *, seed: int, shuffle: bool) -> None:
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self._permutations: OrderedDict[int, Permutation] = OrderedDict()
        self._chunks: OrderedDict[tuple[int, int], Ids] = OrderedDict()
        self._next: Meanwhile[Ids] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(Order(self.n, seed=self.seed, shuffle=self.shuffle))

    def take(self, epoch: int, start: int, stop: int, *, ahead: bool = False) -> Ids:
        """Ids at positions ``start..stop`` of an epoch: int64[stop - start]. ahead: the next ones will be
        asked for after these, so another thread makes them meanwhile.
        """
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        first, last = start // _CHUNK, (stop - 1) // _CHUNK
        if first == last:
            return self._chunk(epoch, first, ahead)[start - first * _CHUNK : stop - first * _CHUNK]
        joined = np.concatenate([self._chunk(epoch, c, ahead) for c in range(first, last + 1)])
        return joined[start - first * _CHUNK : stop - first * _CHUNK]

    def _chunk(self, epoch: int, index: int, ahead: bool) -> Ids:
        found = self._chunks.get((epoch, index))
        if found is None:
            following = self._next
            if following is not None and following.of == (epoch, index):
                found = following.result()
            if found is None:
                found = self._made(epoch, index)
            self._chunks[epoch, index] = found
            if len(self._chunks) > 4:
                self._chunks.popitem(last=False)
            if ahead and self.n >= _WORTH_WHILE and len(os.sched_getaffinity(0)) > 1:
                is_last = (index + 1) * _CHUNK >= self.n
                self._next = Meanwhile(self._made, *((epoch + 1, 0) if is_last else (epoch, index + 1)))
        return found

    def _made(self, epoch: int, index: int) -> Ids:
        positions = np.arange(index * _CHUNK, min((index + 1) * _CHUNK, self.n), dtype=np.int64)
        found = self.permutation(epoch)(positions)
        found.flags.writeable = False
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
