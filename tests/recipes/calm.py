"""A small classifier that learns calmly, slow enough to be killed in its midst; data through a Dataset."""

import time
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import surefoot as sf


class Points:
    def __init__(self, n: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        centres = np.random.default_rng(0).normal(size=(4, 12))
        y = rng.integers(0, 4, n)
        self.x = (centres[y] + 0.7 * rng.normal(size=(n, 12))).astype("float32")
        self.y = y.astype("int64")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i):
        if i % 16 == 0:
            time.sleep(1e-5)  # which takes ten times as long
        return torch.from_numpy(self.x[i]), int(self.y[i])


def accuracy(model: nn.Module, data) -> torch.Tensor:
    return (model(data[0]).argmax(1) == data[1]).float()


def recipe(guard: Literal["heal", "watch", "off"] = "heal") -> sf.Recipe:
    held_out = Points(1000, 2)
    return sf.Recipe(
        model=lambda: nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4)),
        data=sf.Dataset(Points(32 * 400, 1)),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(lr=0.05, momentum=0.9),
        batch=sf.Batch(32),
        until=400,
        validation=sf.Validation(
            sf.Arrays(held_out.x, held_out.y), metrics={"accuracy": accuracy}, every=400, batch=1000
        ),
        guard=sf.Guard(guard),
    )
