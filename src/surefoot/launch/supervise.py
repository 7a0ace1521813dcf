"""The supervisor: starts a training command again when it crashes, as long as that helps.

It is a process of its own, without torch, so that what ends the training (the system's out-of-memory
killer, a crash in compiled code) does not end it too.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from surefoot.launch import NOTE
from surefoot.record.folder import RunFolder
from surefoot.record.rows import read_log
from surefoot.stopping import handling

INTERRUPTED = 75
_FINAL = (0, 2, 3, 4)
"""Exit codes after which the same command has nothing more to do, or would say the same again."""
_HOPELESS = ("user", "state")
_ADVICE = {
    "out_of_memory": "Need less memory: a smaller batch.micro or compute.micro_batch, fewer data.workers.",
    "disk": "Make room or mend the disk that holds the run; see checkpoint_failed in events.jsonl.",
    "signal": "Something else ends the process: the system's log (dmesg) or the scheduler's says what.",
    "unknown": "Run the command by itself and look at its traceback.",
}


@dataclass(frozen=True)
class Failure:
    """How one process of a run ended badly. kind: see `surefoot.errors.failure_class`, or ``signal``."""

    number: int
    kind: str
    what: str
    step: int


@dataclass
class Supervisor:
    """Runs a command until it is done.

    Args:
        command: arguments of ``surefoot``: ``train FILE ...``.
        run_dir: the run directory that it writes.
        most: failures without progress, in a row, that are borne: a crash loop.
        first_s: pause after a failure without progress; doubled each time up to a minute.
        say: takes lines for people.
    """

    command: Sequence[str]
    run_dir: Path
    most: int = 5
    first_s: float = 1.0
    say: Callable[[str], None] = print
    failures: list[Failure] = field(default_factory=list)
    _stop: int = 0
    _note: dict[str, str] = field(default_factory=dict)
    _child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Starts the command until it ends for good; the exit code to end with."""
        furthest, in_a_row, number = self._furthest(), 0, 0
        with handling(self._ask):
            while True:
                number += 1
                ooms = _oom_kills()
                code = self._start()
                if code in _FINAL and self._note.get("failure", "user") == "user":
                    return code
                if self._stop and code == INTERRUPTED:
                    return code
                reached = self._furthest()
                in_a_row = 1 if reached > furthest else in_a_row + 1
                furthest = max(furthest, reached)
                failure = self._failure(number, code, reached, oom=_oom_kills() > ooms)
                self.failures.append(failure)
                if self._stop:
                    return INTERRUPTED if self._has_checkpoint() else 1
                if failure.kind in _HOPELESS:
                    self.say(f"{failure.what}; starting again would not help")
                    return code if code > 0 else 1
                if in_a_row >= self.most:
                    self._report(in_a_row)
                    return 1
                wait_s = min(60.0, self.first_s * 2.0 ** (in_a_row - 2)) if in_a_row > 1 else 0.0
                self.say(
                    f"process {number} ended at step {failure.step:,} ({failure.kind}): {failure.what}; "
                    f"starts again in {wait_s:g} s ({in_a_row} of {self.most} without progress)"
                )
                if self._pause(wait_s):
                    return INTERRUPTED if self._has_checkpoint() else 1

    def _start(self) -> int:
        """Runs the command once. In a session of its own, so that Ctrl-C reaches it once: from here."""
        arguments = [sys.executable, "-m", "surefoot", *self.command]
        self._note = {}
        with tempfile.NamedTemporaryFile("r") as note:
            self._child = subprocess.Popen(
                arguments,
                start_new_session=True,
                preexec_fn=die_with_parent,
                env={**os.environ, NOTE: note.name},
            )
            if self._stop:  # asked for meanwhile
                self._child.send_signal(self._stop)
            code = self._child.wait()
            with suppress(ValueError):
                self._note = json.loads(note.read())
        return code

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Passes a request to stop on."""
        self._stop = number
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def _pause(self, seconds: float) -> bool:
        """Waits; whether a stop was asked for."""
        until = time.monotonic() + seconds
        while not self._stop and time.monotonic() < until:
            time.sleep(0.05)
        return bool(self._stop)

    def _furthest(self) -> int:
        """Updates that the run has attempted, repeated ones not counted twice."""
        with suppress(Exception):  # no run yet, or one that cannot be read: no progress
            steps = read_log(RunFolder(self.run_dir).steps).columns["step"]
            return int(steps.max()) + 1 if len(steps) else 0
        return 0

    def _has_checkpoint(self) -> bool:
        return any(RunFolder(self.run_dir).checkpoints.glob("*/MANIFEST.json"))

    def _failure(self, number: int, code: int, step: int, *, oom: bool) -> Failure:
        if code == INTERRUPTED:
            return Failure(number, "signal", "something asked it to stop", step)
        if code < 0:
            name = signal.Signals(-code).name
            if oom and -code == signal.SIGKILL:
                return Failure(number, "out_of_memory", "ended by the system's out-of-memory killer", step)
            return Failure(number, "signal", f"ended by {name}", step)
        what = str(self._note.get("error", f"exit code {code}")).splitlines()[0]
        return Failure(number, str(self._note.get("failure", "unknown")), what, step)

    def _report(self, in_a_row: int) -> None:
        """Says what happened, and writes it beside the run."""
        last = self.failures[-in_a_row:]
        lines = [
            f"# Crash loop: {in_a_row} failures in a row without progress",
            "",
            f"Run: {self.run_dir}",
            f"Command: surefoot {' '.join(self.command)}",
            f"Furthest step: {last[-1].step:,}",
            "",
            "| process | step | kind | what |",
            "|---|---|---|---|",
            *(f"| {f.number} | {f.step:,} | {f.kind} | {f.what} |" for f in last),
            "",
            f"What to do: {_ADVICE.get(last[-1].kind, _ADVICE['unknown'])}",
        ]
        self.say("\n".join(lines))
        folder = RunFolder(self.run_dir)
        if folder.path.is_dir():
            folder.incidents.mkdir(exist_ok=True)
            path = folder.incidents / f"crash-loop-{time.strftime('%Y%m%d-%H%M%S')}.md"
            path.write_text("\n".join(lines) + "\n")
            self.say(f"report: {path}")


def run_directory(command: Sequence[str]) -> Path:
    """Where ``surefoot train`` with these arguments writes its run."""
    for argument, following in zip(command, [*command[1:], ""], strict=True):
        if argument == "--out":
            return Path(following)
        if argument.startswith("--out="):
            return Path(argument.removeprefix("--out="))
    files = [a for a in command[1:] if a.endswith(".py")]
    return Path("runs") / (Path(files[0]).stem if files else "unknown")


def die_with_parent() -> None:
    """Asks for SIGTERM when the parent of this process ends, however that ends."""
    with suppress(OSError, AttributeError):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _oom_kills() -> int:
    """How many processes the system's out-of-memory killer has ended since it started."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0
