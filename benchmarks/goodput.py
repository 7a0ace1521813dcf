"""Goodput under kills: the share of wall time that went into steps which count.

    python benchmarks/goodput.py [--minutes 20] [--every 60] [--out benchmarks/results/goodput.json]

`surefoot supervise` trains the character-level GPT of the examples; every so many seconds the training
process is killed by SIGKILL. Goodput is the sum of `step_s` over the steps of the final lineage (each step
once, however often it was repeated; checkpoints left out), over the wall time of the whole. At the end the
run is verified.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import surefoot as sf

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=60, help="seconds between kills")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "surefoot", "supervise", "--", "train"]
        command += [str(ROOT / "examples/stdlib_gpt.py"), "updates=1000000", "--out", str(run)]
        command += ["--progress", "off", "--threads", str(arguments.threads)]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        kills = 0
        while time.monotonic() - began < 60 * arguments.minutes:
            time.sleep(arguments.every)
            if process.poll() is not None:
                raise SystemExit(f"the supervisor ended with {process.returncode}")
            os.kill(int((run / "LOCK").read_text()), signal.SIGKILL)
            kills += 1
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        wall_s = time.monotonic() - began
        view = sf.open_run(run)
        useful = view.log()
        result = {
            "wall_s": wall_s,
            "kills": kills,
            "exit_code": code,
            "steps": len(useful["step"]),
            "steps_repeated": len(view.log(all_rows=True)["step"]) - len(useful["step"]),
            "goodput": float(useful["step_s"].sum()) / wall_s,
            "checkpoints": sum(e["kind"] == "checkpointed" for e in view.events(all_events=True)),
            "findings": [finding._asdict() for finding in view.verify()],
        }
    print(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
