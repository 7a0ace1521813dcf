"""Counter-based randomness: every random choice is a function of a key.

A key is 64 bits, made by hashing *what the number is for*: ``key(seed, "order", epoch)``. Parts are
hashed with their types and lengths, so no two different lists of parts give the same input to the
hash; in particular (seed=1, epoch=0) and (seed=0, epoch=1) share nothing.
"""

import functools
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

U64 = np.uint64
Words = NDArray[np.uint64]

_GOLDEN = U64(0x9E3779B97F4A7C15)
M1 = U64(0xBF58476D1CE4E5B9)
M2 = U64(0x94D049BB133111EB)


def key(*parts: int | str) -> int:
    """64-bit key of a list of integers and strings (BLAKE2b, injective encoding)."""
    text = "\x1f".join(f"{type(p).__name__[0]}{len(str(p))}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(x: Words) -> Words:
    """Scrambles words one by one, bijectively (finaliser of SplitMix64, Steele et al. 2014).

    Args:
        x: uint64, any shape; not changed.
    """
    x = x ^ (x >> U64(30))
    x = x * M1
    x ^= x >> U64(27)
    x *= M2
    x ^= x >> U64(31)
    return x


def words(base: int, counters: NDArray[Any]) -> Words:
    """One 64-bit word for each counter, for a key: SplitMix64 started at `base`.

    Args:
        base: a key.
        counters: integers, any shape.
    """
    x = (counters.astype(np.uint64) + U64(1)) * _GOLDEN
    x += mix(np.array([base], dtype=np.uint64))[0]
    return mix(x)


def word(base: int, counter: int) -> int:
    """`words` for one counter, in Python's integers; about 1 us."""
    x = ((counter + 1) * int(_GOLDEN) + _mix_int(base)) & _MASK
    return _mix_int(x)


def seed_of(draws: int, step: int, micro: int) -> int:
    """Of a logical micro-batch: ``word(word(draws, step), micro)``."""
    if micro:
        return word(word(draws, step), micro)
    return _first_seeds(draws, step // _TOGETHER)[step % _TOGETHER]


@functools.lru_cache(maxsize=64)
def _first_seeds(draws: int, block: int) -> tuple[int, ...]:
    """Those of the first micro-batches of some steps in a row: together they take less time."""
    steps = np.arange(block * _TOGETHER, (block + 1) * _TOGETHER)
    return tuple(mix(mix(words(draws, steps)) + _GOLDEN).tolist())


_MASK = (1 << 64) - 1
_TOGETHER = 64


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * int(M1)) & _MASK
    x = ((x ^ (x >> 27)) * int(M2)) & _MASK
    return x ^ (x >> 31)
