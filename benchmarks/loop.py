"""Microseconds per update: surefoot at its defaults beside the loops people write.

    python benchmarks/loop.py [--rounds 5] [--threads 1 2] [--out benchmarks/results/loop.json]
    python benchmarks/loop.py --in-turns --workloads cnn gpt [--rounds 25] ...

Contenders, each in a process of its own, in interleaved rounds; medians, and ratios of medians. With
``--in-turns`` all of a workload go on in one process, in turns of a second or so, and the ratios are
medians of those of neighbouring turns: what differs by a few percent shows, however unsteady the machine.
Runs keep no checkpoints meanwhile (what these cost: `checkpoint.py`).

* ``loop``: what people write: ``DataLoader(TensorDataset, shuffle=True)``, ``zero_grad``, ``backward``,
  ``clip_grad_norm_``, ``step``, ``scheduler.step``, ``loss.item()``;
* ``bare``: pre-collated batches, fused optimizer, clipping and schedule, no telemetry;
* ``surefoot``: the loop of `surefoot.fit` at its defaults: shuffled, a row per step, clipping, schedule,
  permission, ledger;
* ``surefoot-fused``: the same with ``fused=True`` in the recipe's optimizer;
* ``surefoot-compiled``: the same with ``compute.compile = on``, at the start of a run of a million updates,
  with the threads that surefoot chooses of these;
* ``surefoot-tuned``: with what `tune compute` finds on the workload;
* ``surefoot-bf16``: with ``precision="bf16"``: another recipe, not a faster way to do the same.

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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from turns import advance, in_turns, ratio

CONTENDERS = (
    "loop", "bare", "surefoot", "surefoot-fused", "surefoot-compiled", "surefoot-tuned", "surefoot-bf16"
)  # fmt: skip
TURN = {"cnn": 40, "gpt": 6}
"""Updates of a turn, where they are not 800."""
CHECKPOINTS: dict[str, str] = {}
"""Settings of a run's checkpoints."""
TUNED = "SUREFOOT_BENCHMARK_TUNED"
"""Environment variable: settings that were found for the workload, as JSON."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workloads", nargs="+", default=["mlp", "cnn", "gpt"])
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--in-turns", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("WORKLOAD", "CONTENDER"), help=argparse.SUPPRESS)
    parser.add_argument("--tune", metavar="WORKLOAD", help=argparse.SUPPRESS)
    parser.add_argument("--one-process", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(run_one(*arguments.one, threads=arguments.threads[0]))
        return
    if arguments.tune:
        print(json.dumps(run_tune(arguments.tune, threads=arguments.threads[0])))
        return
    if arguments.one_process:
        workload, *contenders = arguments.one_process
        print(json.dumps(run_turns(workload, contenders, arguments.threads[0], arguments.rounds)))
        return
    results, measure = [], compare_in_turns if arguments.in_turns else compare
    for threads in arguments.threads:
        for workload in arguments.workloads:
            results.append(measure(workload, threads, arguments.rounds, arguments.contenders))
    if arguments.out:
        import torch

        machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
        arguments.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def compare(workload: str, threads: int, rounds: int, contenders: list[str]) -> dict[str, object]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    variables = with_tuned(sys.executable, workload, threads, contenders)
    for turn in range(rounds):
        for name in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
            command = [sys.executable, __file__, "--one", workload, name, "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
            times[name].append(float(done.stdout.split()[-1]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{workload}, {threads} thread(s): µs per update, x loop, x bare")
    for name, value in medians.items():
        against = [f"{value / medians[c]:.2f}" if c in medians else "-" for c in ("loop", "bare")]
        print(f"  {name:16} {value:10.0f}  {against[0]:>6} {against[1]:>6}", flush=True)
    return {
        "workload": workload, "threads": threads, "us_per_update": medians, "rounds": times,
        "tuned": variables.get(TUNED),
    }  # fmt: skip


def compare_in_turns(workload: str, threads: int, turns: int, contenders: list[str]) -> dict[str, object]:
    variables = with_tuned(sys.executable, workload, threads, contenders)
    command = [sys.executable, __file__, "--one-process", workload, *contenders]
    command += ["--threads", str(threads), "--rounds", str(turns)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables)
    times = json.loads(done.stdout.splitlines()[-1])
    medians = {name: statistics.median(values) for name, values in times.items()}
    against = {
        f"x {other}": {name: ratio(times, name, other) for name in times}
        for other in ("loop", "bare")
        if other in times
    }
    print(f"{workload}, {threads} thread(s), in turns: µs per update, {', '.join(against)}")
    for name, value in medians.items():
        told = " ".join(f"{ratios[name]:6.3f}" for ratios in against.values())
        print(f"  {name:16} {value:10.0f}  {told}", flush=True)
    return {
        "workload": workload, "threads": threads, "us_per_update": medians, **against, "turns": times,
        "tuned": variables.get(TUNED),
    }  # fmt: skip


def with_tuned(
    python: str | Path, workload: str, threads: int, contenders: Sequence[str]
) -> dict[str, str]:
    """Environment variables for contenders, with what `surefoot-tuned` is to use, if it is one of them."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if "surefoot-tuned" in contenders:
        command = [python, str(Path(__file__)), "--tune", workload, "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
        variables[TUNED] = done.stdout.splitlines()[-1]
        print(f"{workload}, {threads} thread(s), tuned: {variables[TUNED]}", flush=True)
    return variables


def run_tune(workload_name: str, *, threads: int) -> dict[str, Any]:
    import torch
    from workloads import WORKLOADS

    torch.set_num_threads(threads)
    return tune(WORKLOADS[workload_name])


def run_one(workload_name: str, contender: str, *, threads: int) -> float:
    import torch
    from turns import Window
    from workloads import WORKLOADS

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    workload = WORKLOADS[workload_name]
    window = Window(workload.warm, workload.timed)
    for done in globals()[contender.replace("-", "_")](workload):
        if window.tick(done):
            return window.us
    raise AssertionError("the contender stopped early")


def run_turns(
    workload_name: str, contenders: Sequence[str], threads: int, turns: int
) -> dict[str, list[float]]:
    import torch
    from workloads import WORKLOADS

    torch.set_num_threads(threads)
    CHECKPOINTS["every"] = "1h"  # by default the clock says when, which goes on in the others' turns
    steps, workload = TURN.get(workload_name, 800), WORKLOADS[workload_name]
    workload = replace(workload, timed=4 * (turns + 2) * steps)  # turns may take more than their steps
    iterators = {name: globals()[name.replace("-", "_")](workload) for name in contenders}
    for contender in iterators.values():
        advance(contender, 0, workload.warm)
    return in_turns(iterators, steps=steps, turns=turns)


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


def surefoot(w, *, settings=None, total=0, **changes):
    from surefoot.api import run_steps
    from surefoot.build import build
    from surefoot.record.folder import RunFolder

    recipe = recipe_of(w, until=total or w.warm + w.timed + 100, **changes)
    with tempfile.TemporaryDirectory() as folder:
        built = build(recipe, RunFolder(f"{folder}/run"), operations(settings or {}))
        for outcome in run_steps(built):
            yield outcome.step + 1


def surefoot_fused(w):
    return surefoot(w, fused=True)


def surefoot_compiled(w):
    return surefoot(w, settings={"compute.compile": "on"}, total=1_000_000)


def surefoot_tuned(w):
    settings = json.loads(os.environ[TUNED])
    return surefoot(w, settings=settings, total=1_000_000 if settings["compute.compile"] == "on" else 0)


def surefoot_bf16(w):
    return surefoot(w, precision="bf16")


def recipe_of(w, *, until, fused=False, **changes):
    import torch.nn.functional as F

    import surefoot as sf

    rate = {"lr": w.lr, "fused": fused}
    return sf.Recipe(
        model=w.model,
        data=sf.Arrays(*w.data()),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(**rate, momentum=0.9) if w.optimizer == "sgd" else sf.AdamW(**rate),
        schedule=sf.cosine(),
        batch=sf.Batch(w.batch),
        gradient=(sf.clip_norm(1.0),),
        until=until,
        **changes,
    )


def operations(settings):
    import surefoot as sf

    compute = {"compile": "off"} | {k.partition(".")[2]: v for k, v in settings.items()}
    return sf.Operations(compute=compute, checkpoint=CHECKPOINTS)


def tune(w):
    """The fastest settings that surefoot finds here for a long run."""
    from surefoot.tune.compute import tune_compute

    return tune_compute(recipe_of(w, until=1_000_000), operations({})).best.settings


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
