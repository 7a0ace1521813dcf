"""How the guard does in the fourteen divergences of `tests/scenarios.py`, ten seeds each.

    python benchmarks/heal.py [--seeds 10] [--processes 2] [--out benchmarks/results/heal.json]

For each: how the run ended, its metric over that of the undisturbed run with the same seed, rollbacks, and,
where it is known in which step the fault strikes, how many steps later it was seen. Without the guard, the
same. Row 7's own undisturbed run does not exist: such a network cannot be trained without the guard.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from scenarios import SCENARIOS, STEPS, base, play

import surefoot as sf

STRIKES: dict[int, Sequence[int]] = {
    3: [500], 4: range(97, STEPS, 97), 5: range(500, 505), 8: range(50, STEPS, 50), 9: [600], 10: [600],
    11: [700],
}  # fmt: skip
"""Steps in which a fault strikes that must be seen there (4, 5, 8, 11) or soon after."""
OPTIMUM = 0.5  # of the quadratic's loss
FIRST_SEED = 3  # the three before are those of `make test`


def played(number: int, seed: int, mode: Literal["heal", "off"]) -> dict[str, Any]:
    """One run. Number 0 is the undisturbed one."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        if not number:
            done = sf.fit(base(seed, sf.Guard()), out=out)
        else:
            done = play(next(s for s in SCENARIOS if s.number == number), seed, sf.Guard(mode), out)
        events = sf.open_run(out).events(all_events=True)
        kinds = [e["kind"] for e in events]
        refused = sorted(
            {e["step"] for e in events if e["kind"] in ("skipped", "would_skip")}
            | {e["step"] for e in events if e["kind"] == "rolled_back"}
        )
        return {
            "row": number,
            "seed": seed,
            "mode": mode,
            "status": done.status,
            "metric": done.metrics.get("loss" if number == 12 else "accuracy", math.nan),
            "rollbacks": kinds.count("rolled_back"),
            "reason": sf.open_run(out).summary().get("reason", ""),
            "seen_after": [_seen_after(strike, refused) for strike in STRIKES.get(number, ())],
        }


def _seen_after(strike: int, refused: list[int]) -> int | None:
    at = int(np.searchsorted(refused, strike))
    return refused[at] - strike if at < len(refused) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    cases = [(0, seed, "heal") for seed in seeds]
    cases += [(s.number, seed, mode) for s in SCENARIOS for mode in ("heal", "off") for seed in seeds]
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        runs = list(pool.map(played, *zip(*cases, strict=True)))
    clean = {run["seed"]: run["metric"] for run in runs if not run["row"]}
    rows = [_row(scenario, runs, clean) for scenario in SCENARIOS]
    for row in rows:
        print(
            f"{row['row']:3} {row['name']:34} {row['ended']!s:36} within 2 %: {row['within_2_percent']:4} "
            f"median {row['median_ratio']:.3f} ({row['median_ratio_off']:.3f} off) rollbacks "
            f"{row['most_rollbacks']} seen {row['seen']}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps({"rows": rows, "clean": clean}, indent=1) + "\n")


def _row(scenario: Any, runs: list[dict[str, Any]], clean: dict[int, float]) -> dict[str, Any]:
    number = scenario.number
    mine = {m: [r for r in runs if (r["row"], r["mode"]) == (number, m)] for m in ("heal", "off")}

    def ratio(run: dict[str, Any]) -> float:
        if not math.isfinite(run["metric"]) or run["status"] == "diverged":
            return 0.0
        return OPTIMUM / run["metric"] if number == 12 else run["metric"] / clean[run["seed"]]

    ratios = {mode: [round(ratio(run), 4) for run in mine[mode]] for mode in mine}
    seen = [after for run in mine["heal"] for after in run["seen_after"]]
    ended = [run["status"] for run in mine["heal"]]
    return {
        "row": number,
        "name": scenario.name,
        "ended": {status: ended.count(status) for status in sorted(set(ended))},
        "reasons": sorted({run["reason"] for run in mine["heal"] if run["status"] == "diverged"}),
        "within_2_percent": sum(r >= 0.98 for r in ratios["heal"]),
        "median_ratio": statistics.median(ratios["heal"]),
        "median_ratio_off": statistics.median(ratios["off"]),
        "broken_off": sum(r < 0.9 for r in ratios["off"]),
        "most_rollbacks": max(run["rollbacks"] for run in mine["heal"]),
        "seen": {
            "strikes": len(seen),
            "in_the_same_step": sum(after == 0 for after in seen),
            "within_20_steps": sum(after is not None and after <= 20 for after in seen),
        },
        "ratios": ratios["heal"],
        "ratios_off": ratios["off"],
    }


if __name__ == "__main__":
    main()
