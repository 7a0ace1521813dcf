"""The rate is 300 times too high for three steps: the run goes back. Slow enough to be killed anywhere."""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import surefoot as sf


class Slow:
    def __init__(self, pause_s: float) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(2000, 12)).astype("float32")
        self.y = (self.x[:, :6].sum(1) > 0).astype("int64")
        self.x[77, 3] = np.nan
        self.pause_s = pause_s

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i):
        time.sleep(self.pause_s)
        return torch.from_numpy(self.x[i]), int(self.y[i])


def recipe(pause_s: float = 0.0) -> sf.Recipe:
    return sf.Recipe(
        model=lambda: nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 2)),
        data=sf.Dataset(Slow(pause_s)),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(lr=0.05, momentum=0.9),
        schedule=sf.constant(over=330) >> sf.constant(over=3) * 300.0 >> sf.constant(),
        batch=sf.Batch(16),
        until=420,
    )
