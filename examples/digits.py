"""Handwritten digits (scikit-learn's bundled set, 1,797 images of 8 x 8): a small network, Nesterov
momentum, warm-up and cosine. About 98 % of unseen digits in a few seconds.

    surefoot train examples/digits.py lr=0.05 epochs=3 --out runs/digits
"""

from typing import Annotated

import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import surefoot as sf


def make_model(hidden: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, 10),
    )


def accuracy(model, data):
    images, labels = data
    return (model(images).argmax(dim=1) == labels).float()


def recipe(
    lr: Annotated[float, "peak learning rate"] = 0.1,
    epochs: Annotated[int, "passes over the data"] = 40,
    batch: Annotated[int, "samples per update"] = 64,
    hidden: Annotated[int, "units of the hidden layer"] = 256,
    dropout: Annotated[float, "share of hidden units dropped"] = 0.2,
    seed: Annotated[int, "of weights, order and dropout"] = 0,
) -> sf.Recipe:
    """Trains a network with one hidden layer on handwritten digits."""
    images, labels = load_digits(return_X_y=True)
    x, x_val, y, y_val = train_test_split(
        (images / 16).astype("float32"), labels, test_size=0.2, random_state=0, stratify=labels
    )
    return sf.Recipe(
        model=lambda: make_model(hidden, dropout),
        data=sf.Arrays(x, y),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=sf.warmup("5%") >> sf.cosine(to=0.01),
        batch=sf.Batch(batch),
        gradient=(sf.clip_norm(1.0),),
        until=f"{epochs}ep",
        validation=sf.Validation(sf.Arrays(x_val, y_val), metrics={"accuracy": accuracy}),
        seed=seed,
    )
