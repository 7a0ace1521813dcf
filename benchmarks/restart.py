"""Time from a kill to the first useful step, beside the cold start of the same process.

    python benchmarks/restart.py [--rounds 10] [--out benchmarks/results/restart.json]

In each round the same command is started in an empty directory (cold: from the start of the process to its
first step), killed by SIGKILL some steps later, and started again (restart: from the kill until the first
step that had not been done before). Medians, and their ratio.
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
from typing import Any

from surefoot.record.rows import read_newest

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cold, restart = [], []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            began = time.perf_counter()
            process = start(run)
            wait_for(run, 1)
            cold.append(time.perf_counter() - began)
            wait_for(run, 200)
            process.kill()
            killed = time.perf_counter()
            process.wait()
            reached = newest(run)
            process = start(run)
            wait_for(run, reached + 1)
            restart.append(time.perf_counter() - killed)
            process.kill()
            process.wait()
    result: dict[str, Any] = {
        "cold_s": statistics.median(cold),
        "restart_s": statistics.median(restart),
        "ratio": statistics.median(restart) / statistics.median(cold),
        "restart_p95_s": sorted(restart)[int(0.95 * (len(restart) - 1))],
        "rounds": {"cold_s": cold, "restart_s": restart},
    }
    print({k: round(v, 3) for k, v in result.items() if k != "rounds"})
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def start(run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "surefoot", "train", str(ROOT / "examples/digits.py"), "epochs=1000"]
    command += ["--out", str(run), "--set", "checkpoint.every=50", "--progress", "off"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def newest(run: Path) -> int:
    """Updates attempted so far, as the log has it."""
    try:
        steps = read_newest(run / "steps", 1)["step"]
    except OSError:
        return 0
    return int(steps[-1]) + 1 if len(steps) else 0


def wait_for(run: Path, step: int) -> None:
    while newest(run) < step:
        time.sleep(0.002)


if __name__ == "__main__":
    main()
