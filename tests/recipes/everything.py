"""A recipe with everything that makes continuing hard: augmentation by three generators, dropout, batch
norm, micro-batches, a ragged tail, momentum, validation, plateau and early stopping with state."""

import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import surefoot as sf

N = 180


class Augmented:
    def __init__(self, pause_s: float) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(N, 12)).astype("float32")
        self.y = (self.x.sum(1) > 0).astype("int64")
        self.pause_s = pause_s

    def __len__(self) -> int:
        return N

    def __getitem__(self, i):
        time.sleep(self.pause_s)
        noise = 0.1 * random.gauss(0, 1) + 0.1 * np.random.normal() + 0.1 * torch.randn(12)
        return torch.from_numpy(self.x[i]) + noise, int(self.y[i])


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 2)
    )


def recipe(
    epochs: int = 5,
    optimizer: str = "sgd",
    precision: str = "fp32",
    pause_s: float = 0.0,
    lr: float = 0.05,
    tail: str = "keep",
) -> sf.Recipe:
    specs = {
        "sgd": sf.SGD(lr=lr, momentum=0.9, weight_decay=1e-3),
        "adamw": sf.AdamW(lr=lr / 10),
    }
    x = np.random.default_rng(1).normal(size=(40, 12)).astype("float32")
    return sf.Recipe(
        model=make_model,
        data=sf.Dataset(Augmented(pause_s)),
        objective=sf.supervised(F.cross_entropy),
        optimizer=specs[optimizer],
        schedule=sf.warmup(10) >> sf.plateau("loss", factor=0.7, patience=1),
        batch=sf.Batch(16, micro=6, tail=tail),
        gradient=(sf.clip_norm(1.0),),
        until=f"{epochs}ep",
        validation=sf.Validation(sf.Arrays(x, (x.sum(1) > 0).astype("int64")), every=7),
        early_stopping=sf.EarlyStopping(patience=1000),
        precision=precision,
    )
