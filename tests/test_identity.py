"""What makes two recipes the same, and how they are told apart."""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, mlp, recipe
from torch import nn

import surefoot as sf
from surefoot.identity import describe, differences


def left(tmp_path, changes):
    for outcome in sf.steps(recipe(**changes), out=tmp_path / "run"):
        if outcome.step == 2:
            break


CHANGED = {
    "rate": ({}, {"optimizer": sf.SGD(lr=0.2, momentum=0.9)}, "recipe.optimizer.lr: 0.1 -> 0.2"),
    "optimizer": ({}, {"optimizer": sf.AdamW()}, "recipe.optimizer: SGD -> AdamW"),
    "schedule": ({}, {"schedule": sf.cosine()}, "recipe.schedule: Constant -> Cosine"),
    "batch": ({}, {"batch": sf.Batch(16)}, "recipe.batch.size: 32 -> 16"),
    "length": ({}, {"until": "3ep"}, "recipe.until: 2ep -> 3ep"),
    "seed": ({}, {"seed": 1}, "recipe.seed: 0 -> 1"),
    "data": ({}, {"data": sf.Arrays(*blobs(seed=1))}, "data.train.digest"),
    "model": ({}, {"model": lambda: mlp(hidden=17)}, "recipe.model.parameters"),
    "clipping": ({}, {"gradient": (sf.clip_norm(1.0),)}, "recipe.gradient"),
    "smoothing": (
        {},
        {"objective": sf.supervised(F.cross_entropy, label_smoothing=0.1)},
        "recipe.objective.options.label_smoothing: (absent) -> 0.1",
    ),
    "code": (
        {"objective": lambda m, d: F.cross_entropy(m(d[0]), d[1], reduction="none")},
        {"objective": lambda m, d: 2 * F.cross_entropy(m(d[0]), d[1], reduction="none")},
        "recipe.objective",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_change_is_refused_with_the_difference(tmp_path, name):
    before, after, says = CHANGED[name]
    left(tmp_path, before)
    with pytest.raises(sf.RunDirectoryError) as caught:
        sf.fit(recipe(**after), out=tmp_path / "run")
    assert says in str(caught.value)
    assert "--out" in str(caught.value)
    assert sf.fit(recipe(**before), out=tmp_path / "run").status == "finished"


def test_descriptions_are_json_and_repeat():
    weight = torch.ones(3)
    things = [
        functools.partial(F.cross_entropy, weight=weight), np.float32(0.5), {1, 2}, {"a": (1, None)},
        float("inf"), nn.Linear(2, 2), mlp, lambda: mlp(hidden=3),
        sf.supervised(F.cross_entropy, weight=weight), range(3), b"x", torch.optim.SGD,
    ]  # fmt: skip
    for thing in things:
        assert json.loads(json.dumps(describe(thing))) == describe(thing)
    assert describe(np.float32(0.5)) == 0.5
    assert describe(weight) != describe(weight * 2)


def test_what_a_function_closes_over_counts():
    def make(hidden):
        return lambda: mlp(hidden=hidden)

    assert describe(make(3)) == describe(make(3)) != describe(make(4))


def test_comments_and_docstrings_do_not_count():
    def one(x):
        """Says one thing."""
        return x + 1  # so

    first = describe(one)

    def one(x):
        """Says another."""

        return x + 1

    assert describe(one) == first

    def one(x):
        return x + 2

    assert describe(one) != first


def test_differences_are_readable():
    before = {"a": 1, "b": {"": "SGD", "lr": 0.1}, "c": [1, 2]}
    now = {"a": 1, "b": {"": "Adam", "lr": 0.2}, "c": [1, 3], "d": 4}
    assert differences(before, now) == [
        "b: SGD -> Adam", "b.lr: 0.1 -> 0.2", "c[1]: 2 -> 3", "d: (absent) -> 4",
    ]  # fmt: skip
