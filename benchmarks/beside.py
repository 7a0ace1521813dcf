"""What Python does in a compiled step beside its kernels: runs of the MLP whose kernels do nothing.

    python benchmarks/beside.py [--turns 30] [--out benchmarks/results/beside.json]

Microseconds per update, one thread, of runs that go on in turns: compiled updates that nobody is told of
(``silent``), with all that a run does but the guard (``off``), and with it (``heal``). Least, median, and
the median difference from ``off`` in the same turn. What kernels would give is made beforehand, around a
level that the guard has seen; ordinary steps, and those of short batches, are real ones. Steps are called
one by one; where they are taken in laps, the other core does this meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from guard import updates
from torch import Tensor
from turns import advance, in_turns

from surefoot.compiled import Compiled

MODES = ("silent", "off", "heal")
STEPS, WARM, NUM_ROWS = 8000, 3000, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    Compiled.laps = lambda self, written: None  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        runs = {mode: updates("mlp", mode, "on", f"{folder}/{mode}") for mode in MODES}
        for run in runs.values():
            advance(run, 0, WARM)
        Compiled.again = without_kernels()  # type: ignore[method-assign]
        times = in_turns(runs, steps=STEPS, turns=arguments.turns)
    found = {
        mode: {
            "least_us": min(values),
            "median_us": statistics.median(values),
            "more_than_off_us": statistics.median(a - b for a, b in zip(values, times["off"], strict=True)),
        }
        for mode, values in times.items()
    }
    for mode, numbers in found.items():
        print(mode, " ".join(f"{name} {value:.2f}" for name, value in numbers.items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def without_kernels() -> Any:
    """In place of `Compiled.again`: puts arguments together as that does, and gives rows in a circle."""
    rng, num = random.Random(0), 0
    rows = [
        torch.tensor([rng.gauss(0.5, 0.05), abs(rng.gauss(1.0, 0.2)), 1e-3, 1.0], dtype=torch.float64)
        for _ in range(NUM_ROWS)
    ]
    norms = torch.rand(4)

    def again(self: Compiled, moving: Sequence[Any]) -> Sequence[Tensor]:
        nonlocal num
        num += 1
        taken = self._arguments.copy()
        for i, place in self._moves:
            taken[i] = moving[place]
        return rows[num % NUM_ROWS], norms

    return again


if __name__ == "__main__":
    main()
