"""Generators that are seldom drawn from rest, and nobody can tell."""

import random

import numpy as np
import pytest
import torch
from conftest import mlp
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from surefoot.generators import Generators

STEPS = 120
TWISTER_BYTES = 4 * 624
DRAWS = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "one bit": lambda: random.getrandbits(1),
    "shuffle": lambda: random.shuffle(list(range(3))) or 0,
    "numpy": np.random.random,
    "normal": np.random.normal,
    "bytes": lambda: len(np.random.bytes(3)),
    "as many as there are": lambda: np.random.bytes(TWISTER_BYTES)[0],
    "permutation": lambda: int(np.random.permutation(5)[0]),
    "seeded": lambda: random.seed(5) or np.random.seed(6) or random.random(),
}


class Draws(nn.Module):
    """Draws in some training steps. The number of a step is in a buffer, which is as it was when passes are
    taken again.
    """

    at = frozenset[int]()
    how = "random"
    calls = 0

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("step", torch.tensor(0))

    def forward(self, x):
        if self.training:
            Draws.calls += 1
            step = int(self.step)
            self.step += 1
            if step in self.at:
                x = x + 0.01 * float(DRAWS[self.how]()) * torch.rand(())
        return self.inner(x)


def trained(fit, at=(), how="random", **changes):
    """Result, and how often the model was called."""
    Draws.at, Draws.how, Draws.calls = frozenset(at), how, 0
    return fit(model=Draws, until=STEPS, **changes), Draws.calls


@pytest.fixture
def seeded(monkeypatch):
    """What Python's generator was seeded by."""
    seeds, seed = [], random.seed
    monkeypatch.setattr(random, "seed", lambda value: seeds.append(value) or seed(value))
    return seeds


@pytest.fixture
def restless(monkeypatch):
    def patch():
        monkeypatch.setattr(Generators, "may_rest", lambda self, allowed: None)

    yield patch
    monkeypatch.undo()


def test_they_rest_where_nobody_draws(fit, seeded):
    trained(fit)
    assert len(seeded) < STEPS / 2


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("at", [range(STEPS), [77], [30, 31, 90], []])
def test_draws_are_functions_of_the_step(fit, restless, at, how):
    found, calls = trained(fit, at, how)
    restless()
    expected, calls_then = trained(fit, at, how)
    assert (found.digest, found.ledger) == (expected.digest, expected.ledger)
    assert calls - calls_then <= 1  # no more than one step is taken again


@pytest.mark.parametrize("how", ["random", "numpy"])
def test_a_model_that_always_draws_is_called_once_a_step(fit, restless, how):
    _, calls = trained(fit, range(STEPS), how)
    restless()
    assert trained(fit, range(STEPS), how)[1] == calls


def test_what_fails_for_a_number_that_is_not_its_own_does_not(fit, restless, monkeypatch):
    """With the numbers of its own step it does not."""

    def in_range():
        if not (drawn := random.random()) < most[0]:
            raise ValueError(drawn)
        return drawn

    most = [1.0]
    monkeypatch.setitem(DRAWS, "picky", in_range)
    with monkeypatch.context() as patched:
        patched.setattr(Generators, "may_rest", lambda self, allowed: None)
        expected = trained(fit, [77], "picky")[0]
        drawn = []
        patched.setitem(DRAWS, "noted", lambda: drawn.append(random.random()) or drawn[-1])
        trained(fit, [77], "noted")
    most[0] = drawn[-1] + 1e-12
    assert trained(fit, [77], "picky")[0].digest == expected.digest


class Noise:
    """A gradient transform that draws."""

    def __call__(self, grads, norm):
        for grad in grads:
            grad += 1e-3 * np.random.normal() + 1e-3 * random.random()


def test_they_do_not_rest_where_others_draw(fit, restless, seeded):
    digest = trained(fit, gradient=(Noise(),))[0].digest
    assert len(seeded) >= STEPS
    restless()
    assert trained(fit, gradient=(Noise(),))[0].digest == digest


@given(
    st.lists(st.sampled_from(["seed", "rest", "none", *DRAWS]), max_size=12),
    st.sampled_from([*DRAWS]),
)
@example(["rest", "seed", "none"], "as many as there are")
def test_no_draw_goes_unnoticed(before, how):
    """Whatever was done before, and also if numpy's generator comes to the same place in its next words."""
    generators = Generators(torch.device("cpu"))
    for what in before:
        if what == "rest":
            generators.may_rest(True)
        elif what == "seed":
            generators.seed(7)
        else:
            if what in DRAWS:
                DRAWS[what]()
            generators.drew()
    fresh = Generators(torch.device("cpu"))
    fresh.may_rest(True)
    for _ in range(3):
        fresh.seed(1)
        assert not fresh.drew()
    fresh.seed(2)
    DRAWS[how]()
    assert fresh.drew()
    fresh.seed(3)
    found = random.random(), np.random.random()
    random.seed(3)
    np.random.seed(3)
    assert found == (random.random(), np.random.random())
    assert not fresh.drew()


def test_another_generator_of_numpys_is_left_seeded():
    before = np.random.get_bit_generator()
    generators = Generators(torch.device("cpu"))
    try:
        np.random.set_bit_generator(np.random.MT19937(3))
        generators.may_rest(True)
        for _ in range(2):
            generators.seed(1)
            first = np.random.random()
            assert not generators.drew()
            generators.seed(1)
            assert np.random.random() == first
        np.random.set_bit_generator(np.random.PCG64(3))
        other = Generators(torch.device("cpu"))
        other.may_rest(True)
        assert not other.drew()
    finally:
        np.random.set_bit_generator(before)
