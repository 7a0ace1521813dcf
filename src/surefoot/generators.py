"""The random generators that forward passes draw from."""

from __future__ import annotations

import random

import numpy as np
import torch


class Generators:
    """Python's, numpy's and torch's generators, and that of the device if it is another.

    Few models draw from Python's, and seeding it takes as long as a small layer. So in steps in which
    nothing but passes may draw, it is left alone after one that did not. It has a twin, seeded alike: as long
    as the next 64 bits of both are the same, nobody drew in between. If they are not, the passes since are to
    be taken again, and it never rests from then on. (What a draw leaves behind could begin with the same 64
    bits, with a probability of 2**-64.)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._twin = random.Random(0)
        self._is_drawn_from = self._is_watched = self._rests = False

    def seed(self, seed: int) -> None:
        """Seeds all but one that rests. Not by `torch.manual_seed`, which takes 0.3 ms, since it visits every
        kind of accelerator.
        """
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index or 0].manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        if self._rests:
            return
        random.seed(seed)
        if self._is_watched:
            self._twin.seed(seed)

    def may_rest(self, allowed: bool) -> None:
        """Python's may rest from now on, or not any more. allowed: nothing but passes draws."""
        self._is_watched, self._rests = allowed and not self._is_drawn_from, False

    def drew(self) -> bool:
        """To be asked after the passes of a step: whether they drew from a generator that rested."""
        if not self._is_watched:
            return False
        if random.getrandbits(64) == self._twin.getrandbits(64):
            self._rests = True
            return False
        rested, self._is_drawn_from = self._rests, True
        self.may_rest(False)
        return rested
