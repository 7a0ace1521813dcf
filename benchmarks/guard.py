"""What the guard costs: microseconds per update with `Guard()` and with `Guard("off")`.

    python benchmarks/guard.py [--rounds 21] [--out benchmarks/results/guard.json]

Both runs go on in one process, in turns (500 updates of the MLP, 10 of the GPT, one thread); the result is
the median ratio of neighbouring turns.
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
from workloads import WORKLOADS

import surefoot as sf

TURN = {"mlp": 500, "gpt": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(name, arguments.rounds) for name in TURN]
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def measure(name: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        runs = {mode: updates(name, mode, rounds, f"{folder}/{mode}") for mode in ("heal", "off")}
        times: dict[str, list[float]] = {mode: [] for mode in runs}
        for turn in range(rounds + 1):
            for mode in sorted(runs, reverse=bool(turn % 2)):
                began = time.perf_counter()
                for _ in range(TURN[name]):
                    next(runs[mode])
                if turn:
                    times[mode].append(1e6 * (time.perf_counter() - began) / TURN[name])
        for run in runs.values():
            run.close()  # type: ignore[attr-defined]
    ratios = [a / b for a, b in zip(times["heal"], times["off"], strict=True)]
    medians = {mode: statistics.median(values) for mode, values in times.items()}
    ratio = statistics.median(ratios)
    print(f"{name}: {medians['heal']:.0f} µs with the guard, {medians['off']:.0f} without: {ratio:.3f}")
    return {"workload": name, "us_per_update": medians, "ratio": ratio, "ratios": ratios}


def updates(name: str, mode: str, rounds: int, out: str) -> Iterator[Any]:
    w = WORKLOADS[name]
    recipe = sf.Recipe(
        model=w.model,
        data=sf.Arrays(*w.data()),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(lr=w.lr, momentum=0.9) if w.optimizer == "sgd" else sf.AdamW(lr=w.lr),
        schedule=sf.cosine(),
        batch=sf.Batch(w.batch),
        gradient=(sf.clip_norm(1.0),),
        until=TURN[name] * (rounds + 1) + 1,
        guard=sf.Guard(mode),
    )
    return iter(sf.steps(recipe, out=out))


if __name__ == "__main__":
    main()
