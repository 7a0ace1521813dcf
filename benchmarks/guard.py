"""What the guard costs, and what all that surefoot does beside the arithmetic costs in a compiled step.

    python benchmarks/guard.py [--processes 6] [--turns 15] [--out benchmarks/results/guard.json]

Ratios of microseconds per update, with the threads that a run has at its defaults, or `--threads`. In each
process two runs go on in turns, without a checkpoint meanwhile (what these cost: `checkpoint.py`); the
result is the median over processes of the medians of ratios of neighbouring turns:

* ``mlp``, ``gpt``: ``Guard()`` beside ``Guard("off")``, eager; ``normed``: an MLP with batch norm, whose
  running statistics are looked at, too;
* ``mlp-compiled``, ``cnn-compiled``, ``gpt-compiled``, ``normed-compiled``: the same, compiled;
* ``mlp-adds``, ``cnn-adds``, ``gpt-adds``: a compiled run with guard, log and ledger beside the same
  compiled updates, fed and at the same rates, with none of these;
* ``mlp-same``, ``mlp-compiled-same``: ``Guard("off")`` beside itself, and ``cnn-adds-same``,
  ``gpt-adds-same``: compiled updates that nobody is told of beside themselves: what is noise.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from turns import in_process, in_turns, num_done, ratio
from workloads import WORKLOADS

import surefoot as sf
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.calm import LAP
from surefoot.clock import AHEAD_S, Batches
from surefoot.course import Silence, multipliers, update
from surefoot.graph import Graph
from surefoot.guard.detect import LAG
from surefoot.laps import Done
from surefoot.prepare import Prepared, prepare
from surefoot.record.folder import RunFolder
from surefoot.types import Minibatch

STEPS = {
    "mlp": 400, "mlp compiled": 4000, "normed": 400, "normed compiled": 4000,
    "gpt": 10, "gpt compiled": 10, "cnn compiled": 60,
}  # fmt: skip
"""Of a turn: two of the guard's cycles of 200, or what takes seconds. Compiled ones take half a second:
after each change of turns a run begins with cold caches.
"""
PAIRS = {
    "mlp": ("heal", "off"),
    "gpt": ("heal", "off"),
    "mlp-compiled": ("heal", "off"),
    "cnn-compiled": ("heal", "off"),
    "gpt-compiled": ("heal", "off"),
    "normed": ("heal", "off"),
    "normed-compiled": ("heal", "off"),
    "mlp-adds": ("heal", "silent"),
    "cnn-adds": ("heal", "silent"),
    "gpt-adds": ("heal", "silent"),
    "mlp-same": ("off", "off again"),
    "mlp-compiled-same": ("off", "off again"),
    "cnn-adds-same": ("silent", "silent again"),
    "gpt-adds-same": ("silent", "silent again"),
}
LONG = 1_000_000
_ALL = (math.inf, math.inf, math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("PAIR", "ORDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        pair, order = arguments.one
        print(json.dumps(measure(pair, arguments.turns, arguments.threads, reverse=order == "reverse")))
        return
    results, same = [], ["--turns", str(arguments.turns)]
    if arguments.threads:
        same += ["--threads", str(arguments.threads)]
    for pair in arguments.pairs:
        rounds = [
            in_process(__file__, "--one", pair, ("as given", "reverse")[i % 2], *same)
            for i in range(arguments.processes)
        ]
        found = statistics.median(r["ratio"] for r in rounds)
        threads = {r.pop("threads") for r in rounds}.pop()
        results.append({"pair": pair, "threads": threads, "ratio": found, "processes": rounds})
        told = ", ".join(f"{r['ratio']:.3f}" for r in rounds)
        one, other = PAIRS[pair]
        print(f"{pair}, {threads} thread(s): {one} takes {found:.3f} of {other} ({told})", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def measure(pair: str, turns: int, threads: int | None, *, reverse: bool) -> dict[str, Any]:
    workload, _, extent = pair.partition("-")
    compiled = "on" if extent.startswith(("compiled", "adds")) else "off"
    steps = STEPS[f"{workload} compiled" if compiled == "on" else workload]
    with tempfile.TemporaryDirectory() as folder:
        modes = PAIRS[pair][::-1] if reverse else PAIRS[pair]
        runs = {mode: updates(workload, mode, compiled, f"{folder}/{mode}", threads) for mode in modes}
        begun = RunFolder(f"{folder}/{PAIRS[pair][0]}")
        threads = (
            begun.identity()["environment"]["threads"] if begun.holds_run() else torch.get_num_threads()
        )
        times = in_turns(runs, steps=steps, turns=turns)
    medians = {mode: statistics.median(values) for mode, values in times.items()}
    return {"threads": threads, "us_per_update": medians, "ratio": ratio(times, *PAIRS[pair])}


def updates(workload: str, mode: str, compiled: str, out: str, threads: int | None = None) -> Iterator[Any]:
    w = WORKLOADS[workload]
    recipe = sf.Recipe(
        model=w.model,
        data=sf.Arrays(*w.data()),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(lr=w.lr, momentum=0.9) if w.optimizer == "sgd" else sf.AdamW(lr=w.lr),
        schedule=sf.cosine(),
        batch=sf.Batch(w.batch),
        gradient=(sf.clip_norm(1.0),),
        until=LONG,
        guard=sf.Guard("heal" if mode == "heal" else "off"),
    )
    operations = sf.Operations(
        compute={"compile": compiled, "threads": threads}, checkpoint={"every": "1h"}
    )
    if not mode.startswith("silent"):
        return num_done(run_steps(build(recipe, RunFolder(out), operations)))
    return silent(prepare(recipe, operations))


def silent(made: Prepared) -> Iterator[int]:
    """The same updates, compiled, of which nobody is told; how many are done."""
    feed = made.feed(lambda kind, **facts: None)
    course = made.course(feed, None, Silence(), deque(maxlen=1))  # type: ignore[arg-type]
    graph, state, batches = course.graph, course.state, Batches(feed.batches(0, LONG))
    assert isinstance(graph, Graph)
    while True:
        left, direct = graph.direct(state.step)
        until = time.perf_counter() + AHEAD_S
        begun: deque[tuple[list[Minibatch], Callable[[], Done]]] = deque()
        while direct is not None and (left or begun):
            while left and (ahead := sum(len(some) for some, _ in begun)) <= LAG:
                fetched = batches.ahead(min(LAP, left))
                rates = multipliers(course, len(fetched), after=ahead)
                num, wait = direct.begin(fetched, rates, _ALL, until)
                batches.give_back(fetched[num:])
                left = left - num if num == len(fetched) else 0
                begun.append((fetched[:num], wait))
            some, wait = begun.popleft()
            num = len(wait().rows)
            state.step += num
            if num < len(some):  # time is up
                left = 0
                batches.give_back([*some[num:], *(batch for more, _ in begun for batch in more)])
                while begun:
                    begun.popleft()[1]()
        update(course, next(batches))
        yield state.step  # with nothing under way, which would be the other's time


if __name__ == "__main__":
    main()
