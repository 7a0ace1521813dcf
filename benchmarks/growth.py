"""How the cost of a step and of a start grow with model and data.

    python benchmarks/growth.py [--rounds 3] [--out benchmarks/results/growth.json]

Each size in processes of its own; medians over rounds. Models: perceptrons with two hidden layers, 1e4 to
1e8 parameters, batch 16, SGD with momentum, beside the bare loop in turns. Data: `sf.Arrays` of 1e3 to 1e8
samples of 4 float32, read in shuffled batches of 64 by a model of 97 parameters. `start_s` is from the call
of `build` to the end of the first step, `rss_mb` the largest resident size, of which `before_mb` lay there
before.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import in_process, in_turns, num_done, ratio

import surefoot as sf
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.record.folder import RunFolder

HIDDEN = {"1e4": 62, "1e5": 277, "1e6": 958, "1e7": 3122, "1e8": 9960}
STEPS = {"1e4": 200, "1e5": 200, "1e6": 50, "1e7": 10, "1e8": 3}
SAMPLES = {f"1e{i}": 10**i for i in range(3, 9)}
TURNS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what, size = arguments.one
        torch.set_num_threads(1)
        print(json.dumps(of_model(size) if what == "model" else of_data(size)))
        return
    results: dict[str, dict[str, dict[str, float]]] = {"model": {}, "data": {}}
    for what, sizes in (("model", HIDDEN), ("data", SAMPLES)):
        for size in sizes:
            rounds = [in_process(__file__, "--one", what, size) for _ in range(arguments.rounds)]
            found = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            results[what][size] = found
            print(what, size, {name: float(f"{value:.4g}") for name, value in found.items()}, flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def of_model(size: str) -> dict[str, float]:
    hidden = HIDDEN[size]

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )

    data = torch.randn(4096, 64), torch.randint(0, 10, (4096,))
    before = rss_mb()
    run, start_s = started(make, data, F.cross_entropy, batch=16)
    times = in_turns({"surefoot": run, "bare": bare(make, data)}, steps=STEPS[size], turns=TURNS)
    found = {f"{name}_us": statistics.median(values) for name, values in times.items()}
    return found | {
        "ratio": ratio(times, "surefoot", "bare"), "start_s": start_s, "rss_mb": rss_mb(),
        "before_mb": before,
    }  # fmt: skip


def of_data(size: str) -> dict[str, float]:
    x = torch.empty(SAMPLES[size], 4).uniform_()
    before = rss_mb()

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))

    def squares(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - batch.sum(1)) ** 2

    run, start_s = started(make, (x,), squares, batch=64)
    times = in_turns({"surefoot": run}, steps=1000, turns=TURNS)
    return {
        "surefoot_us": statistics.median(times["surefoot"]), "start_s": start_s, "rss_mb": rss_mb(),
        "before_mb": before,
    }  # fmt: skip


def started(
    make: Callable[[], nn.Module], data: tuple[Tensor, ...], loss: Callable[..., Tensor], *, batch: int
) -> tuple[Iterator[Any], float]:
    """A run after its first step, and the seconds until then."""
    recipe = sf.Recipe(
        model=make,
        data=sf.Arrays(*data),
        objective=sf.supervised(loss) if len(data) == 2 else loss,
        optimizer=sf.SGD(lr=0.01, momentum=0.9),
        batch=sf.Batch(batch),
        gradient=(sf.clip_norm(1.0),),
        until=1_000_000_000,
    )
    operations = sf.Operations(compute={"compile": "off", "threads": 1})
    folder = tempfile.TemporaryDirectory()
    begun = time.perf_counter()
    run = num_done(run_steps(build(recipe, RunFolder(f"{folder.name}/run"), operations)))
    next(run)
    start_s = time.perf_counter() - begun

    def rest() -> Iterator[Any]:
        with folder:
            yield from run

    return rest(), start_s


def bare(make: Callable[[], nn.Module], data: tuple[Tensor, ...]) -> Iterator[None]:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batches = list(zip(*(t.split(16) for t in data), strict=True))
    while True:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield


def rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
