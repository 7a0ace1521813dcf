"""Microseconds per row appended to the step log, sealing of blocks included.

    python benchmarks/log.py [--rounds 7] [--out benchmarks/results/log.json]

Beside it, in the same rounds: ``write()`` of each packed row, and a JSON line per row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import tempfile
import time
from pathlib import Path

from surefoot.record.columns import COLUMNS
from surefoot.record.log import StepLog

ROWS = 50_000


def row(i):
    return [i + k if c.kind == "q" else i / 3 + k for k, c in enumerate(COLUMNS)]


def step_log(folder, rows):
    log = StepLog(folder / "steps")
    begun = time.perf_counter()
    for values in rows:
        log.append(values)
    seconds = time.perf_counter() - begun
    log.close()
    return seconds


def write_each(folder, rows):
    pack = struct.Struct("<" + "".join(c.kind for c in COLUMNS)).pack
    with (folder / "rows").open("wb", buffering=0) as file:
        begun = time.perf_counter()
        for values in rows:
            file.write(pack(*values))
        return time.perf_counter() - begun


def json_lines(folder, rows):
    names = [c.name for c in COLUMNS]
    with (folder / "rows.jsonl").open("w") as file:
        begun = time.perf_counter()
        for values in rows:
            file.write(json.dumps(dict(zip(names, values, strict=True))) + "\n")
        return time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [row(i) for i in range(ROWS)]
    times: dict[str, list[float]] = {writer.__name__: [] for writer in (step_log, write_each, json_lines)}
    for _ in range(arguments.rounds):
        for writer in (step_log, write_each, json_lines):
            with tempfile.TemporaryDirectory() as folder:
                times[writer.__name__].append(1e6 * writer(Path(folder), rows) / ROWS)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:12} {value:8.2f} µs per row of {8 * len(COLUMNS)} bytes")
    if arguments.out:
        result = {"cores": os.cpu_count(), "rows": ROWS, "us_per_row": medians, "rounds": times}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
