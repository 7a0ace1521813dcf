"""Microseconds per update: surefoot at its defaults beside the loops people write.

    python benchmarks/loop.py [--rounds 5] [--threads 1 2] [--out benchmarks/results/loop.json]

Contenders, each in a process of its own, in interleaved rounds; medians, and ratios of medians:

* ``loop``: what people write: ``DataLoader(TensorDataset, shuffle=True)``, ``zero_grad``, ``backward``,
  ``clip_grad_norm_``, ``step``, ``scheduler.step``, ``loss.item()``;
* ``bare``: pre-collated batches, fused optimizer, clipping and schedule, no telemetry;
* ``surefoot``: the loop of `surefoot.fit` at its defaults: shuffled, a row per step, clipping, schedule,
  permission, ledger;
* ``surefoot-fused``: the same with ``fused=True`` in the recipe's optimizer;
* ``surefoot-compiled``: the same with ``compute.compile = on``, at the start of a run of a million updates.

A benchmark is never a test: it prints and stores numbers, and passes or fails nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTENDERS = ("loop", "bare", "surefoot", "surefoot-fused", "surefoot-compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workloads", nargs="+", default=["mlp", "cnn", "gpt"])
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WORKLOAD", "CONTENDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(run_one(*arguments.one, threads=arguments.threads[0]))
        return
    results = []
    for threads in arguments.threads:
        for workload in arguments.workloads:
            results.append(compare(workload, threads, arguments.rounds, arguments.contenders))
    if arguments.out:
        import torch

        machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
        arguments.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def compare(workload: str, threads: int, rounds: int, contenders: list[str]) -> dict[str, object]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
            command = [sys.executable, __file__, "--one", workload, name, "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            times[name].append(float(done.stdout.split()[-1]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{workload}, {threads} thread(s): µs per update, x loop, x bare")
    for name, value in medians.items():
        against = [f"{value / medians[c]:.2f}" if c in medians else "-" for c in ("loop", "bare")]
        print(f"  {name:16} {value:10.0f}  {against[0]:>6} {against[1]:>6}", flush=True)
    return {"workload": workload, "threads": threads, "us_per_update": medians, "rounds": times}


def run_one(workload_name: str, contender: str, *, threads: int) -> float:
    import torch
    from workloads import WORKLOADS

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    workload = WORKLOADS[workload_name]
    steps = {
        "loop": loop,
        "bare": bare,
        "surefoot": surefoot,
        "surefoot-fused": surefoot_fused,
        "surefoot-compiled": surefoot_compiled,
    }
    begun = 0.0
    for done, _ in enumerate(steps[contender](workload), start=1):
        if done == workload.warm:
            begun = time.perf_counter()
        if done == workload.warm + workload.timed:
            return 1e6 * (time.perf_counter() - begun) / workload.timed
    raise AssertionError("the contender stopped early")


def loop(w):
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, TensorDataset
    from workloads import torch_optimizer

    model = w.model()
    optimizer = torch_optimizer(w, model)
    total = w.warm + w.timed
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    loader = DataLoader(TensorDataset(*w.data()), batch_size=w.batch, shuffle=True)
    losses = []
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            yield


def bare(w):
    import torch
    import torch.nn.functional as F
    from workloads import torch_optimizer

    model = w.model()
    optimizer = torch_optimizer(w, model, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, w.warm + w.timed)
    x, y = w.data()
    batches = [(a.clone(), b.clone()) for a, b in zip(x.split(w.batch), y.split(w.batch), strict=True)]
    while True:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            yield


def surefoot(w, *, fused=False, compiled="off", total=0):
    import torch.nn.functional as F

    import surefoot as sf
    from surefoot.api import run_steps
    from surefoot.build import build
    from surefoot.record.folder import RunFolder

    rate = {"lr": w.lr, "fused": fused}
    recipe = sf.Recipe(
        model=w.model,
        data=sf.Arrays(*w.data()),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(**rate, momentum=0.9) if w.optimizer == "sgd" else sf.AdamW(**rate),
        schedule=sf.cosine(),
        batch=sf.Batch(w.batch),
        gradient=(sf.clip_norm(1.0),),
        until=total or w.warm + w.timed + 1,
    )
    operations = sf.Operations(compute={"compile": compiled})
    with tempfile.TemporaryDirectory() as folder:
        yield from run_steps(build(recipe, RunFolder(f"{folder}/run"), operations))


def surefoot_fused(w):
    return surefoot(w, fused=True)


def surefoot_compiled(w):
    return surefoot(w, compiled="on", total=1_000_000)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
