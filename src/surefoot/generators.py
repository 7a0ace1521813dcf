"""The random generators that forward passes draw from."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import torch

_WORDS = 624  # of a Mersenne twister; numpy keeps behind them how many are used up


class Generators:
    """Python's, numpy's and torch's generators, and that of the device if it is another.

    Few models draw from Python's or numpy's, and seeding these takes as long as a small layer. So where
    nothing but passes may draw, they rest after a step that drew from neither, until one that does: its
    passes are to be taken again, and neither rests from then on. Python's has a twin, seeded alike: the
    next 64 bits of both are the same as long as nobody drew. Of numpy's it is looked at how many of its
    words are used up, and at two of them, which draws change. (Draws go unnoticed with a probability of
    2**-64.)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._twin = random.Random(0)
        self._numpy = _numpys()
        self._words = _words_of(self._numpy)
        self._left = 0, 0, 0
        self._are_drawn_from = self._are_watched = self._rest = False

    def seed(self, seed: int) -> None:
        """Seeds all but those that rest. Not by `torch.manual_seed`, which takes 0.3 ms, since it visits
        every kind of accelerator.
        """
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index or 0].manual_seed(seed)
        if self._rest:
            return
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        if self._are_watched:
            self._twin.seed(seed)
            self._left = self._now()

    def may_rest(self, allowed: bool) -> None:
        """Python's and numpy's may rest from now on, or not any more. allowed: nothing but passes draws."""
        known = self._words is not None and _numpys() is self._numpy
        self._are_watched, self._rest = allowed and known and not self._are_drawn_from, False

    def drew(self) -> bool:
        """To be asked after the passes of a step: whether they drew from a generator that rested."""
        if not self._are_watched:
            return False
        if self._now() == self._left and random.getrandbits(64) == self._twin.getrandbits(64):
            self._rest = True
            return False
        rested, self._are_drawn_from = self._rest, True
        self.may_rest(False)
        return rested

    def _now(self) -> tuple[int, int, int]:
        """What a draw from numpy's generator changes."""
        words = self._words
        assert words is not None
        return words[_WORDS], words[0], words[_WORDS - 1]


def _numpys() -> Any:
    """What numpy's functions draw from."""
    return np.random.get_bit_generator()  # type: ignore[attr-defined]


def _words_of(generator: Any) -> memoryview | None:
    """Its own memory: its words, and how many of them are used up. None if it is no Mersenne twister, or
    they do not lie where they do in numpy 2.
    """
    if type(generator) is not np.random.MT19937:
        return None
    own = (ctypes.c_uint32 * (_WORDS + 1)).from_address(generator.ctypes.state_address)
    words, state = memoryview(own).cast("B").cast("I"), generator.state["state"]
    return words if words.tolist() == [*state["key"].tolist(), state["pos"]] else None
