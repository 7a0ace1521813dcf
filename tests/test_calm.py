"""Training that goes well is left alone: no rollback, hardly ever a refused update, on ten workloads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surefoot as sf

N = 20_000


def points(seed: int = 0, *, classes: int = 10, features: int = 32, spread: float = 0.55, weights=None):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(classes, features)) * spread
    y = rng.choice(classes, N, p=weights)
    return (centres[y] + rng.normal(size=(N, features))).astype("float32"), y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


class CNN(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(72, 10),
        )  # fmt: skip


class RNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 24, batch_first=True), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.rnn(x.unflatten(1, (8, 4)))[0][:, -1])
        return out


class GPT(nn.Module):
    """One block over 16 tokens of 16 kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(16, 24), nn.Embedding(16, 24)
        self.block = nn.TransformerEncoderLayer(24, 2, 48, 0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(24, 16)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(16))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.place.weight
        out: torch.Tensor = self.head(self.block(x, src_mask=self.mask, is_causal=True))
        return out.transpose(1, 2)


def text() -> sf.Arrays:
    """A Markov chain."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(16, 0.2), 16).cumsum(1)
    tokens = np.zeros((N, 17), np.int64)
    tokens[:, 0] = rng.integers(0, 16, N)
    for t in range(16):
        tokens[:, t + 1] = (rng.random((N, 1)) > chain[tokens[:, t]]).sum(1).clip(0, 15)
    return sf.Arrays(tokens[:, :-1].copy(), tokens[:, 1:].copy())


def heavy_tailed() -> sf.Arrays:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 32)).astype("float32")
    y = x @ rng.normal(size=32).astype("float32") + rng.standard_t(2.5, N).astype("float32")
    return sf.Arrays(x, y.astype("float32")[:, None])


def pixels() -> sf.Arrays:
    return sf.Arrays(*points(features=64))


CE = sf.supervised(F.cross_entropy)
SGD = sf.SGD(lr=0.05, momentum=0.9)
WORKLOADS = {
    "mlp": {},
    "cnn": {"model": CNN, "data": pixels},
    "rnn": {"model": RNN, "optimizer": sf.Adam(lr=1e-3)},
    "gpt": {
        "model": GPT,
        "data": text,
        "optimizer": sf.AdamW(lr=1e-3),
        "schedule": sf.warmup(100) >> sf.cosine(),
    },
    "heavy tails": {
        "model": lambda: nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)),
        "data": heavy_tailed,
        "objective": sf.supervised(F.mse_loss),
        "optimizer": sf.SGD(lr=0.01),
    },
    "imbalanced": {"data": lambda: sf.Arrays(*points(weights=[0.955, *[0.005] * 9]))},
    "edge of stability": {"optimizer": sf.SGD(lr=0.35)},
    "small batch": {"batch": sf.Batch(4), "optimizer": sf.SGD(lr=0.01, momentum=0.9)},
    "adam": {"optimizer": sf.Adam(lr=3e-3)},
    "bf16": {"precision": "bf16"},
}


def trained(name: str, steps: int, out) -> sf.Result:
    settings = dict(WORKLOADS[name])
    data = settings.pop("data", lambda: sf.Arrays(*points()))()
    base = {
        "model": mlp,
        "objective": CE,
        "optimizer": SGD,
        "batch": sf.Batch(64),
        "until": steps,
        "gradient": (),
    }
    return sf.fit(sf.Recipe(data=data, **(base | settings)), out=out)


def assert_calm(done: sf.Result, steps: int) -> None:
    events = sf.open_run(done.run_dir).events(all_events=True)
    told = [e for e in events if e["kind"] not in ("started", "checkpointed", "ended", "validated")]
    kinds = [e["kind"] for e in told if e.get("detector") != "D6"]  # a suspicion: slow, and left alone
    assert done.status == "finished"
    assert not {"rolled_back", "borne", "alarm", "layer", "diverged"} & set(kinds), told
    assert kinds.count("skipped") <= steps * 1e-5, told


@pytest.mark.parametrize("name", WORKLOADS)
def test_calm_training_is_left_alone(tmp_path, name):
    assert_calm(trained(name, 650, tmp_path / "run"), 650)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_million_calm_steps_are_left_alone(tmp_path, name):
    """A hundred thousand each."""
    assert_calm(trained(name, 100_000, tmp_path / "run"), 100_000)
