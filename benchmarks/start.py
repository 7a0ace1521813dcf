"""From the start of a process to the first step, on the digits, beside a plain loop.

    python benchmarks/start.py [--rounds 10] [--out benchmarks/results/start.json]

Contenders, each in a process of its own, in interleaved rounds; medians of the seconds until the first
update is done:

* ``plain``: ``import torch``, the same data and model, one update by hand;
* ``surefoot``: the example's recipe through `sf.steps`, eager, with its run directory;
* ``train``: the command ``surefoot train examples/digits.py``, until the first row lies in the log.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from restart import start, wait_for

ROOT = Path(__file__).parent.parent
PLAIN = """
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
images, labels = load_digits(return_X_y=True)
x, _, y, _ = train_test_split((images / 16).astype("float32"), labels, test_size=0.2, stratify=labels)
x, y = torch.from_numpy(x[:64]), torch.from_numpy(y[:64])
model = nn.Sequential(
    nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
nn.functional.cross_entropy(model(x), y).backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print("done", flush=True)
"""
SUREFOOT = """
import runpy, sys
import surefoot as sf
recipe = runpy.run_path(sys.argv[1])["recipe"]()
for _ in sf.steps(recipe, out=sys.argv[2]):
    print("done", flush=True)
    break
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {"plain": [], "surefoot": [], "train": []}
    for turn in range(arguments.rounds):
        for name in list(times)[:: -1 if turn % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                times[name].append(seconds(name, Path(folder) / "run"))
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "s": medians,
        "surefoot_of_plain": medians["surefoot"] / medians["plain"],
        "train_of_plain": medians["train"] / medians["plain"],
        "rounds": times,
    }
    print({k: v for k, v in result.items() if k != "rounds"})
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def seconds(name: str, run: Path) -> float:
    begun = time.perf_counter()
    if name == "train":
        process = start(run)
        wait_for(run, 1)
        took = time.perf_counter() - begun
    else:
        code = PLAIN if name == "plain" else SUREFOOT
        command = [sys.executable, "-c", code, str(ROOT / "examples/digits.py"), str(run)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        took = time.perf_counter() - begun
        process.stdout.close()
    process.kill()
    process.wait()
    return took


if __name__ == "__main__":
    main()
