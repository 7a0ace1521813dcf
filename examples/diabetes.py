"""One loop from full-batch to single-sample descent: a linear model on scikit-learn's diabetes set,
compared with the closed-form least-squares answer.

    surefoot train examples/diabetes.py --out runs/full                          # all 442 in each step
    surefoot train examples/diabetes.py batch=1 updates=20000 lr=0.01 --out runs/single

``distance`` is ||w - w*|| / ||w*||: how far the weights are from the exact answer.
"""

from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import nn

import surefoot as sf


def whitened() -> tuple[np.ndarray, np.ndarray]:
    """Ten features made uncorrelated, so that one rate suits all directions; the target in units of
    its standard deviation.
    """
    x, y = load_diabetes(return_X_y=True)
    left, _, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return left * np.sqrt(len(x)), ((y - y.mean()) / y.std())[:, None]


def recipe(
    batch: Annotated[int, "samples per update; 0: all of them"] = 0,
    updates: Annotated[int, "length of the run"] = 100,
    lr: Annotated[float, "first learning rate; it falls to zero"] = 0.3,
    seed: int = 0,
) -> sf.Recipe:
    """Least squares by gradient descent, with any batch size."""
    x, y = whitened()
    exact = torch.from_numpy(np.linalg.lstsq(x, y, rcond=None)[0].T)

    def distance(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return ((model.weight - exact).norm() / exact.norm()).expand(len(data[0]))

    def make_model() -> nn.Module:
        model = nn.Linear(10, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        return model

    return sf.Recipe(
        model=make_model,
        data=sf.Arrays(x, y),
        objective=sf.supervised(F.mse_loss),
        optimizer=sf.SGD(lr=lr),
        schedule=sf.linear(to=0.0),
        batch=sf.Batch(batch or "full", tail="straddle"),
        until=updates,
        validation=sf.Validation(sf.Arrays(x, y), metrics={"distance": distance}, every="10%"),
        seed=seed,
    )
