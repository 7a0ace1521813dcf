"""Shuffled reading of arrays in memory: samples per second.

    python benchmarks/reading.py [--rounds 7] [--one-core] [--out benchmarks/results/reading.json]

A million samples of 64 float32 in batches of 256, without training, one thread of torch's; on all cores, or
on one, where no other thread can make the next order meanwhile. Contenders take an epoch
each in turns; medians, and medians of ratios of neighbouring turns:

* ``surefoot``: the batches of a run with `sf.Arrays`: order, gathering, checks;
* ``index_select``: ``torch.index_select(x, 0, permutation[i:i + 256])``, the permutation drawn beforehand;
* ``dataloader``: ``DataLoader(TensorDataset(x), batch_size=256, shuffle=True)``; a tenth of an epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset
from turns import in_turns, ratio

from surefoot.data.feed import Feed
from surefoot.data.plan import Plan
from surefoot.data.sources import Arrays

SAMPLES, WIDTH, BATCH = 1_000_000, 64, 256
EPOCH = SAMPLES // BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one-core", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    x = torch.randn(SAMPLES, WIDTH)
    times = in_turns(
        {"surefoot": surefoot(x), "index_select": index_select(x)}, steps=EPOCH, turns=arguments.rounds
    )
    slow = in_turns(
        {"surefoot": surefoot(x), "dataloader": dataloader(x)}, steps=EPOCH // 10, turns=arguments.rounds
    )
    all_times = times | {"dataloader": slow["dataloader"]}
    result: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "us_per_batch": {name: statistics.median(values) for name, values in all_times.items()},
        "rate_of_index_select": 1 / ratio(times, "surefoot", "index_select"),
        "times_dataloader": ratio(slow, "dataloader", "surefoot"),
    }
    for name, us in result["us_per_batch"].items():
        print(f"{name:14} {us:8.1f} us per batch, {BATCH / us:6.2f} million samples/s")
    print(f"{result['rate_of_index_select']:.2f} of the rate of index_select", end=", ")
    print(f"{result['times_dataloader']:.1f} times that of DataLoader")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def surefoot(x: torch.Tensor) -> Iterator[Any]:
    feed = Feed(Arrays(x), Plan(SAMPLES, BATCH, seed=1), 1, torch.device("cpu"))
    return feed.batches(0, 1 << 40)


def index_select(x: torch.Tensor) -> Iterator[Any]:
    permutation = torch.randperm(SAMPLES)
    while True:
        for i in range(EPOCH):
            yield torch.index_select(x, 0, permutation[i * BATCH : (i + 1) * BATCH])


def dataloader(x: torch.Tensor) -> Iterator[Any]:
    while True:
        yield from DataLoader(TensorDataset(x), batch_size=BATCH, shuffle=True)


if __name__ == "__main__":
    main()
