"""Runs whose steps do not repeat to the bit: a model that draws from the system's randomness, in effect as
kernels do that add in no fixed order. That a replay differs is no fault of the machine then.
"""

import os

import numpy as np
import pytest
import torch
from conftest import recipe
from scenarios import mlp
from test_heal import continued_after_a_kill, events, jump
from torch import nn

import surefoot as sf
from surefoot.measure.readings import Readings


class Unrepeatable(nn.Module):
    def __init__(self, net=None):
        super().__init__()
        self.net = mlp() if net is None else net

    def forward(self, x):
        drawn = np.frombuffer(os.urandom(x.numel()), "uint8").reshape(x.shape)
        return self.net(x + 1e-7 * torch.from_numpy(drawn.astype("float32")))


@pytest.mark.parametrize("lag", [0, 8])
def test_a_slow_run_goes_on(tmp_path, monkeypatch, lag):
    begin = Readings.__init__
    monkeypatch.setattr(Readings, "__init__", lambda self, on: begin(self, on) or setattr(self, "lag", lag))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2000, 8)).astype("float32"), rng.integers(0, 3, 2000)
    changed = recipe(
        model=lambda: Unrepeatable(nn.Linear(8, 3)),
        data=sf.Arrays(x, y),
        optimizer=sf.SGD(lr=1e-6),
        until=1000,
    )
    done = sf.fit(changed, out=tmp_path / "run")
    (told,) = events(done.run_dir, "alarm")
    assert told["detector"] == "D6"
    assert events(done.run_dir, "rolled_back") == []
    assert done.status == "finished"


def test_a_run_that_goes_wrong_is_healed(tmp_path):
    done = sf.fit(jump(model=Unrepeatable), out=tmp_path / "run")
    (back,) = events(done.run_dir, "rolled_back")
    assert (back["step"], back["cause"]) == (400, "the learning rate jumped")
    assert "otherwise each time" in back["reason"]
    assert done.status == "finished"
    assert done.metrics["accuracy"] > 0.9


def test_a_run_that_is_continued_tells_of_it_and_goes_on(tmp_path):
    done = continued_after_a_kill(tmp_path, model=Unrepeatable)
    (told,) = events(tmp_path / "killed", "alarm")
    assert told["detector"] == "D7"
    assert events(tmp_path / "killed", "rolled_back") == []
    assert done.status == "finished"
