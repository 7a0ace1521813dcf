"""Microseconds per update on a GPU: surefoot, captured, beside the loops people write.

    python benchmarks/gpu.py [--workloads mlp cnn gpt2] [--turns 5] [--out benchmarks/results/gpu.json]

Contenders take turns in one process, with a synchronisation at the end of each turn; medians, and medians
of the ratios of neighbouring turns:

* ``loop``: what people write: ``DataLoader(TensorDataset, shuffle=True)``, each batch moved to the GPU,
  ``zero_grad``, ``backward``, ``clip_grad_norm_``, ``step``, ``scheduler.step``, ``loss.item()``;
* ``bare``: batches that lie on the GPU, a fused optimizer, clipping and schedule, no telemetry;
* ``surefoot``: `surefoot.fit` at its defaults: shuffled, a row per step, guard, ledger, its step captured;
* ``surefoot-eager``: the same with ``compute.compile = off``.

Runs of surefoot ask torch for kernels that repeat bit for bit, the others do not; ``surefoot-any`` does not
either (``compute.deterministic = false``).

GPT-2 (124 M parameters, context 1024, batch 8, bf16) has blocks and a loss that torch compiles:
``compiled`` is a loop by hand around it, with batches that lie on the GPU and a fused optimizer. Model
flops utilisation counts 6 operations per parameter and token, and 12 per layer, token, context and width
for attention (Chowdhery et al. 2022), against the 989 TFLOP/s of an H100 or H200 in bf16.

A benchmark is never a test: it prints and stores numbers, and passes or fails nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from loop import recipe_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from turns import advance, num_done, ratio
from workloads import WORKLOADS, Block, torch_optimizer

import surefoot as sf
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.record.folder import RunFolder

GPU = torch.device("cuda", 0)
PEAK = 989e12
_LONG = 1_000_000
CONTEXT, WIDTH, LAYERS, HEADS, TOKENS, BATCH = 1024, 768, 12, 12, 50304, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["mlp", "cnn", "gpt2"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = []
    for name in arguments.workloads:
        results.append(gpt2(arguments.turns) if name == "gpt2" else small(name, arguments.turns))
        print(json.dumps(results[-1]["us_per_update"]), json.dumps(results[-1]["ratios"]), flush=True)
        if arguments.out:
            machine = {"gpu": torch.cuda.get_device_name(GPU), "torch": torch.__version__}
            arguments.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def in_turns(
    contenders: dict[str, Iterator[Any]], *, warm: int, steps: int, turns: int
) -> dict[str, list[float]]:
    """Microseconds per step of each contender in each turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    done = dict.fromkeys(contenders, 0)
    for name, contender in contenders.items():
        kernels_for(name)
        done[name] = advance(contender, 0, warm)
    for turn in range(turns):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            kernels_for(name)
            torch.cuda.synchronize()
            first, begun = done[name], time.perf_counter()
            done[name] = advance(contenders[name], first, steps)
            torch.cuda.synchronize()
            times[name].append(1e6 * (time.perf_counter() - begun) / (done[name] - first))
    for contender in contenders.values():
        if hasattr(contender, "close"):
            contender.close()
    return times


def kernels_for(contender: str) -> None:
    repeats = contender in ("surefoot", "surefoot-eager")
    torch.use_deterministic_algorithms(repeats, warn_only=True)


def told(workload: str, times: dict[str, list[float]], against: str, **facts: Any) -> dict[str, Any]:
    medians = {name: round(statistics.median(values), 1) for name, values in times.items()}
    ratios = {name: round(ratio(times, name, against), 4) for name in times}
    return {"workload": workload, "us_per_update": medians, "ratios": ratios, "turns": times, **facts}


def small(name: str, turns: int) -> dict[str, Any]:
    w = WORKLOADS[name]
    contenders = {
        "loop": loop(w),
        "bare": bare(w),
        "surefoot": surefoot(recipe_of(w, until=_LONG), "on"),
        "surefoot-any": surefoot(recipe_of(w, until=_LONG), "on", deterministic=False),
        "surefoot-eager": surefoot(recipe_of(w, until=_LONG), "off"),
    }
    return told(name, in_turns(contenders, warm=400, steps=400, turns=turns), "loop")


def loop(w: Any) -> Iterator[None]:
    model = w.model().to(GPU)
    optimizer = torch_optimizer(w, model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _LONG)
    loader = DataLoader(TensorDataset(*w.data()), batch_size=w.batch, shuffle=True)
    losses = []
    while True:
        for batch in loader:
            x, y = (leaf.to(GPU) for leaf in batch)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            yield


def bare(w: Any) -> Iterator[None]:
    model = w.model().to(GPU)
    optimizer = torch_optimizer(w, model, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _LONG)
    x, y = (leaf.to(GPU) for leaf in w.data())
    batches = list(zip(x.split(w.batch), y.split(w.batch), strict=True))
    while True:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            yield


def surefoot(recipe: sf.Recipe, compiled: str, *, deterministic: bool = True) -> Iterator[int]:
    compute = {"compile": compiled, "deterministic": deterministic}
    operations = sf.Operations(device="cuda", compute=compute, checkpoint={"every": "1h"})
    with tempfile.TemporaryDirectory() as folder:
        built = build(recipe, RunFolder(f"{folder}/run"), operations)
        print(*built.notes, sep="\n", flush=True)
        yield from num_done(run_steps(built))
        raise AssertionError(f"the run ended: {sf.open_run(f'{folder}/run').events()[-3:]}")


class GPT2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(TOKENS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.token.weight
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
        for block in self.blocks:
            block.compile(dynamic=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


@torch.compile(dynamic=False)
def each_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


def losses_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    tokens, targets = data
    return each_loss(model(tokens), targets).view(targets.shape).mean(1)


def gpt2(turns: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50257, (64 * BATCH, CONTEXT + 1), generator=generator)
    data = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    recipe = sf.Recipe(
        model=GPT2,
        data=sf.Arrays(*data),
        objective=losses_of,
        optimizer=sf.AdamW(lr=6e-4, weight_decay=0.1),
        schedule=sf.cosine(),
        batch=sf.Batch(BATCH),
        gradient=(sf.clip_norm(1.0),),
        precision="bf16",
        until=_LONG,
    )
    contenders = {
        "compiled": compiled_by_hand(data),
        "surefoot": surefoot(recipe, "on"),
        "surefoot-any": surefoot(recipe, "on", deterministic=False),
    }
    times = in_turns(contenders, warm=80, steps=20, turns=turns)
    size = sum(p.numel() for p in GPT2().parameters())
    operations = BATCH * CONTEXT * (6 * size + 12 * LAYERS * CONTEXT * WIDTH)
    medians = {name: statistics.median(values) for name, values in times.items()}
    facts = {
        "parameters": size,
        "tokens_per_s": {name: round(1e6 * BATCH * CONTEXT / us) for name, us in medians.items()},
        "model_flops_utilisation": {n: round(1e6 * operations / us / PEAK, 4) for n, us in medians.items()},
    }
    print(json.dumps(facts), flush=True)
    return told("gpt2", times, "compiled", **facts)


def compiled_by_hand(data: tuple[Tensor, Tensor]) -> Iterator[None]:
    model = GPT2().to(GPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _LONG)
    batches = list(zip(*(leaf.to(GPU).split(BATCH) for leaf in data), strict=True))

    while True:
        for tokens, targets in batches:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = losses_of(model, (tokens, targets)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            yield


if __name__ == "__main__":
    main()
