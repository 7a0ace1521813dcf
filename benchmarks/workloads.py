"""The models and data that benchmarks train: alike for every contender."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model, its data, and how it is trained. `warm` updates are not timed, `timed` are."""

    name: str
    model: Any
    optimizer: str
    lr: float
    batch: int
    warm: int
    timed: int

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, the same for every contender."""
        generator = torch.Generator().manual_seed(0)
        return self.model.samples(generator)


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    @staticmethod
    def samples(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(20_000, 64, generator=generator)
        return x, torch.randint(0, 10, (20_000,), generator=generator)


class OwnMLP(MLP):
    """Goes forward in a way of its own, as a model may that draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        first, activation, second = self
        return second(activation(first(x)))


class NormedMLP(nn.Sequential):
    """With running statistics."""

    samples = MLP.samples

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))


class CNN(nn.Sequential):
    """About 100,000 parameters on 28 x 28 images."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 3 * 3, 75),
            nn.ReLU(),
            nn.Linear(75, 10),
        )

    @staticmethod
    def samples(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Something can be learned, or surefoot looks into that after 192 updates, amid those timed."""
        y = torch.randint(0, 10, (6_400,), generator=generator)
        patterns = torch.randn(10, 1, 28, 28, generator=generator)
        return patterns[y] + torch.randn(6_400, 1, 28, 28, generator=generator), y


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            part.view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(d, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Four layers, d = 128, context 128, 96 tokens; gives logits (batch, tokens, context)."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(96, 128), nn.Embedding(128, 128)
        self.blocks = nn.Sequential(*(Block(128, 4) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 96, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits.transpose(1, 2)

    @staticmethod
    def samples(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 96, (1_600, 129), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


WORKLOADS = {
    w.name: w
    for w in (
        Workload("mlp", MLP, "sgd", 0.05, 64, 200, 3_000),
        Workload("mlp-own", OwnMLP, "sgd", 0.05, 64, 200, 3_000),
        Workload("mlp-adamw", MLP, "adamw", 1e-3, 64, 200, 3_000),
        Workload("normed", NormedMLP, "sgd", 0.05, 64, 200, 3_000),
        Workload("cnn", CNN, "sgd", 0.05, 64, 20, 200),
        Workload("gpt", GPT, "adamw", 1e-3, 16, 4, 25),
    )
}


def torch_optimizer(workload: Workload, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """The workload's optimizer with torch's own options."""
    if workload.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=workload.lr, momentum=0.9, **options)
    return torch.optim.AdamW(model.parameters(), lr=workload.lr, **options)
