"""Compiled updates of small models whose kernels have one thread, and as many as there are cores.

    python benchmarks/threads.py [--rounds 3] [--out benchmarks/results/threads.json]

It is what the rule of `surefoot.choice` rests on: where no kernel of a forward pass has more than 2^21
floating-point operations, or 2^16 elements, and there are no more weights, one thread is quicker, or not
much slower. Each measurement in a process of its own, in interleaved rounds; medians of microseconds per
update.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import Window, advance, in_process, num_done

import surefoot as sf
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.choice import SHORT, SMALL
from surefoot.prepare import prepare
from surefoot.record.folder import RunFolder
from surefoot.trials import Trial
from surefoot.work import count


class Attention(nn.Module):
    """A block of a transformer over 16 tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mixed = nn.Embedding(50, width), nn.Linear(width, 3 * width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x: Tensor = self.embed(tokens)
        q, k, v = self.mixed(x).chunk(3, -1)
        x = x + torch.softmax(q @ k.mT / k.shape[-1] ** 0.5, -1) @ v
        x = x + self.narrow(F.gelu(self.wide(self.norm(x))))
        logits: Tensor = self.head(x.mean(1))
        return logits


def mlp(*widths: int) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        return nn.Sequential(*(m for layer in layers[:-1] for m in (layer, nn.ReLU())), layers[-1])

    return model


class Elementwise(nn.Module):
    """A small layer behind functions of each element."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(features), nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.last(self.norm(torch.tanh(self.norm(torch.tanh(x)))))
        return logits


def conv(channels: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2), nn.ReLU(), nn.Conv2d(channels, channels, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(36 * channels, 10),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp 64-128-10": (mlp(64, 128, 10), (64,), 64),
    "mlp 64-256-10": (mlp(64, 256, 10), (64,), 64),
    "mlp 64-512-10": (mlp(64, 512, 10), (64,), 64),
    "mlp 3 x 128": (mlp(128, 128, 128, 128, 10), (128,), 64),
    "mlp 3 x 192": (mlp(192, 192, 192, 192, 10), (192,), 64),
    "mlp 8-16-16-10, batch 1024": (mlp(8, 16, 16, 10), (8,), 1024),
    "mlp 256-64-256-64-10": (mlp(256, 64, 256, 64, 10), (256,), 64),
    "mlp 512-64-512-64-10": (mlp(512, 64, 512, 64, 10), (512,), 32),
    "tanh and norm, 64 x 256": (lambda: Elementwise(256), (256,), 64),
    "tanh and norm, 256 x 256": (lambda: Elementwise(256), (256,), 256),
    "tanh and norm, 1024 x 256": (lambda: Elementwise(256), (256,), 1024),
    "conv 4": (conv(4), (1, 28, 28), 64),
    "conv 8": (conv(8), (1, 28, 28), 64),
    "attention 16": (lambda: Attention(16), (), 16),
    "attention 32": (lambda: Attention(32), (), 16),
}
WARM, SECONDS = 300, 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, threads = arguments.one
        print(json.dumps(measure(name, int(threads))))
        return
    cores, results = len(os.sched_getaffinity(0)), []
    for name in arguments.models:
        found: dict[int, list[float]] = {1: [], cores: []}
        for turn in range(arguments.rounds):
            for threads in sorted(found, reverse=turn % 2 == 1):
                one = in_process(__file__, "--one", name, str(threads))
                found[threads].append(one["us"])
        medians = {threads: statistics.median(times) for threads, times in found.items()}
        del one["us"]
        results.append({"model": name, **one, "us": medians, "rounds": found})
        told = ", ".join(f"{us:.0f} us with {threads}" for threads, us in medians.items())
        rule = "one" if one["most"] <= SHORT and max(one["elements"], one["weights"]) <= SMALL else "all"
        size = "at most {most:,} operations, {elements:,} elements, {weights:,} weights".format(**one)
        print(f"{name}: {told}; by the rule {rule}; {size}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def measure(name: str, threads: int) -> dict[str, float]:
    """us: microseconds per update. most, elements: see `surefoot.work.Work`."""
    model, shape, batch = MODELS[name]
    torch.manual_seed(0)
    x = torch.randn(20_000, *shape) if shape else torch.randint(50, (20_000, 16))
    recipe = sf.Recipe(
        model=model,
        data=sf.Arrays(x, torch.randint(10, (20_000,))),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(lr=0.01, momentum=0.9),
        schedule=sf.cosine(),
        batch=sf.Batch(batch),
        gradient=(sf.clip_norm(1.0),),
        until=1_000_000,
    )
    made = prepare(recipe, sf.Operations(compute={"compile": "off"}))
    feed = made.feed(lambda kind, **facts: None)
    counted = count(Trial(made.parts, made.state, feed.at, made.total))
    assert not isinstance(counted, str)
    operations = sf.Operations(compute={"compile": "on", "threads": threads})
    with tempfile.TemporaryDirectory() as folder:
        run = num_done(run_steps(build(recipe, RunFolder(f"{folder}/run"), operations)))
        begun = time.perf_counter()
        done = advance(run, 0, 2 * WARM)
        window = Window(WARM, int(SECONDS / (time.perf_counter() - begun) * done))
        while not window.tick(next(run)):
            pass
        run.close()  # type: ignore[attr-defined]
    weights = sum(p.numel() for p in made.parts.params)
    return {"us": window.us, "most": counted.most, "elements": counted.elements, "weights": weights}


if __name__ == "__main__":
    main()
