"""The recipe of the golden run: made once, to be readable by every later version.

surefoot train recipe.py --out run-2 --set checkpoint.every=5 --set data.workers=0
"""

import numpy as np
import torch.nn.functional as F
from torch import nn

import surefoot as sf


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def recipe(lr: float = 0.05) -> sf.Recipe:
    x = np.linspace(-1, 1, 160, dtype=np.float32).reshape(40, 4)
    y = (np.arange(40) % 3 == 0).astype(np.int64)
    return sf.Recipe(
        model=model,
        data=sf.Arrays(x, y),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(lr=lr, momentum=0.9),
        groups=(sf.Group("0.bias", freeze=True),),
        batch=sf.Batch(8),
        until=12,
        validation=sf.Validation(sf.Arrays(x, y), every="1ep"),
    )
