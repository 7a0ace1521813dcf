"""A small character-level GPT on the source text of Python's own standard library.

    surefoot train examples/stdlib_gpt.py --out runs/gpt
    surefoot train examples/stdlib_gpt.py updates=2000 precision=bf16 --out runs/gpt-bf16

Needs nothing that Python does not bring. The metric is bits per character on modules that are not
trained on; guessing every character alike gives 6.6, gzip about 2.1.
"""

import math
import sysconfig
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surefoot as sf

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
OTHER = len(ALPHABET)  # every other character
VOCABULARY = OTHER + 1


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            part.view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(d, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Characters (b, t) -> logits (b, t, vocabulary)."""

    def __init__(self, layers: int, width: int, context: int, dropout: float) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, 4, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.characters.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.characters(x) + self.positions.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(hidden)))


class Windows:
    """A source of overlapping windows of a text: fetch(ids) -> (characters, next characters)."""

    def __init__(self, text: np.ndarray, context: int, stride: int) -> None:
        self.text, self.context, self.stride = text, context, stride

    def __len__(self) -> int:
        return (len(self.text) - self.context - 1) // self.stride + 1

    def fetch(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = self.text[ids[:, None] * self.stride + np.arange(self.context + 1)]
        window = torch.from_numpy(rows.astype(np.int64))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def fingerprint(self) -> dict:
        return {
            "text": int(np.dot(self.text.astype(np.uint64), np.arange(len(self.text), dtype=np.uint64)))
        }


def read(paths: list[Path]) -> np.ndarray:
    table = np.full(0x110000, OTHER, np.uint8)
    table[[ord(c) for c in ALPHABET]] = np.arange(len(ALPHABET))
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return table[np.array([ord(c) for c in text], np.int64)]


def next_character(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Loss per window: the mean over its characters, in nats."""
    x, y = data
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def bits_per_character(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return next_character(model, data) / math.log(2)


def recipe(
    updates: Annotated[int, "length of the run"] = 600,
    lr: Annotated[float, "peak learning rate"] = 2e-3,
    batch: Annotated[int, "windows per update"] = 16,
    context: Annotated[int, "characters per window"] = 128,
    layers: int = 4,
    width: int = 128,
    dropout: float = 0.1,
    files: Annotated[int, "modules to read, the largest left out"] = 120,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    seed: int = 0,
) -> sf.Recipe:
    """Trains a GPT to write Python."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    held_out = modules[::10]
    return sf.Recipe(
        model=lambda: GPT(layers, width, context, dropout),
        data=Windows(read([m for m in modules if m not in held_out]), context, stride=context // 2),
        objective=next_character,
        optimizer=sf.AdamW(lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
        schedule=sf.warmup("5%") >> sf.cosine(to=0.1),
        batch=sf.Batch(batch),
        gradient=(sf.clip_norm(1.0),),
        until=updates,
        validation=sf.Validation(
            Windows(read(held_out), context, stride=8 * context),
            metrics={"bits_per_character": bits_per_character},
            every="20%",
        ),
        precision=precision,
        seed=seed,
    )
