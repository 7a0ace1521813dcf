"""So many updates that the calls of kernels are compiled, too; some of them are refused."""

import numpy as np
import torch.nn.functional as F
from torch import nn

import surefoot as sf


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def data() -> sf.Arrays:
    rng = np.random.default_rng(0)
    x = rng.standard_t(3.0, (4000, 8)).astype("float32")
    y = (x[:, :3] + rng.normal(size=(4000, 3))).argmax(1)
    x[17] *= 1e6
    return sf.Arrays(x, y)


def recipe() -> sf.Recipe:
    return sf.Recipe(
        model=model,
        data=data(),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(lr=0.05, momentum=0.9),
        schedule=sf.cosine(),
        batch=sf.Batch(32),
        until=200_000,
    )
