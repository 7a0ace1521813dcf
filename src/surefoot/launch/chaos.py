"""Game days: trains a recipe undisturbed and with faults; says what was survived, and at what cost."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from surefoot.errors import RunDirectoryError, StateError, SurefootError, UsageError
from surefoot.launch.faults import FAULTS
from surefoot.launch.supervise import die_with_parent
from surefoot.record.rows import read_log
from surefoot.run import RunView, open_run

Train = Callable[[Path, str, int], int]
"""Trains into a folder, with a fault of its own process ("" for none) at a step; the exit code."""
CANNOT = 5
"""The exit code if it cannot have its fault."""
_CLOSE, _ROUNDING = 0.02, 1e-9


@dataclass(frozen=True)
class Played:
    """What became of a run with a fault.

    why: it was not survived, or not played. repeated: updates that were taken again. extra_s: wall time
    more than undisturbed. same_bits: as the undisturbed run's weights. metrics, clean: by name.
    """

    fault: str
    says: str
    survived: bool | None
    why: str
    status: str = ""
    repeated: int = 0
    extra_s: float = 0.0
    same_bits: bool = False
    interventions: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    clean: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))


@dataclass
class GameDay:
    """Faults, each in a training of its own below `folder`.

    train: called in a forked process each time, which spares the imports. original: a run of which a copy
    is gone on with; None: trained from the start.
    at: step of the fault; None: half-way. say: is told what goes on.
    """

    train: Train
    folder: Path
    original: Path | None = None
    at: int | None = None
    say: Callable[[str], None] = print
    _clean: RunView | None = None
    _clean_s: float = 0.0

    def undisturbed(self) -> RunView:
        """Trains without any fault; what the others are compared with.

        Raises:
            RunDirectoryError: `folder` holds something, or the original has ended.
            StateError: the training failed.
        """
        if self.folder.exists() and any(self.folder.iterdir()):
            raise RunDirectoryError(f"{self.folder} is not empty.", fix="Give another --out.")
        first = 0
        if self.original is not None:
            view = open_run(self.original)
            if self.folder.resolve().is_relative_to(self.original.resolve()):
                raise RunDirectoryError(
                    f"{self.folder} lies within {self.original}.", fix="Give another --out."
                )
            if view.status == "running":
                raise RunDirectoryError(f"{self.original} is going on.", fix="Stop it first.")
            if view.status in ("finished", "stopped_early", "diverged"):
                raise RunDirectoryError(
                    f"{self.original} has ended: {view.status}.",
                    why="A copy of it has nothing left to do.",
                    fix="Give a run that was interrupted, or leave --run out.",
                )
            first = view.summary()["step"]
        self.say("trains undisturbed")
        self.folder.mkdir(parents=True, exist_ok=True)
        out, begun = self._place("undisturbed"), time.monotonic()
        code, text = self._run(out, "", 0)
        self._clean_s = time.monotonic() - begun
        if code != 0:
            what = f"the undisturbed training ended with exit code {code}: {text or 'nothing was said'}"
            if code != UsageError.exit_code:
                raise StateError(what)
            shutil.rmtree(self.folder)
            raise UsageError(what)
        self._clean = open_run(out)
        total = self._clean.summary()["step"]
        self.at = self.at if self.at is not None else (first + total) // 2
        if not first < self.at < total:
            shutil.rmtree(self.folder)
            raise RunDirectoryError(
                f"--at {self.at} lies outside the {total - first:,} steps from {first:,} on.",
                fix="Give a step between, and a run of some hundred steps.",
            )
        return self._clean

    def play(self, name: str) -> Played:
        """Trains with a fault."""
        assert self._clean is not None
        assert self.at is not None
        fault = FAULTS[name]
        self.say(f"{name}: {fault.says}")
        out, begun = self._place(name), time.monotonic()
        try:
            code, text = self._from_outside(name, out) if fault.outside else self._run(out, name, self.at)
        except _NotPlayedError as error:
            return Played(name, fault.says, None, str(error))
        if code == CANNOT:
            return Played(name, fault.says, None, text.splitlines()[0].removeprefix("error: "))
        took = time.monotonic() - begun
        return self._judged(name, out, took, text)

    def _judged(self, name: str, out: Path, took_s: float, text: str) -> Played:
        assert self._clean is not None
        fault, clean, view = FAULTS[name], self._clean.summary(), open_run(out)
        told, findings = view.summary(), view.verify()
        rows = view.log(all_rows=True)["step"]
        same = told["digest"] == clean["digest"] and told["ledger"] == clean["ledger"]
        why = ""
        if told["status"] not in ("finished", "stopped_early"):
            last = text.splitlines()[-1] if text else ""
            why = f"{told['status']}: {told['reason'] or last}"
        elif findings:
            why = f"{findings[0].file}: {findings[0].what}"
        elif fault.exact and not same:
            why = "the end has other bits than the undisturbed run's"
        elif not same:
            why = _apart(told["metrics"], clean["metrics"])
        return Played(
            name,
            fault.says,
            not why,
            why,
            status=told["status"],
            repeated=len(rows) - len(set(rows.tolist())),
            extra_s=round(took_s - self._clean_s, 2),
            same_bits=same,
            interventions=told["interventions"],
            metrics=told["metrics"],
            clean=clean["metrics"],
        )

    def _place(self, name: str) -> Path:
        """Where a run of this day lies; a copy of the original lies there already."""
        out = self.folder / name
        if self.original is not None:
            shutil.copytree(self.original, out, ignore=shutil.ignore_patterns("LOCK"))
        return out

    def _run(self, out: Path, fault: str, at: int) -> tuple[int, str]:
        """Trains to the end; the exit code, and what was said on standard error."""
        with self._started(out, fault, at) as (process, said):
            process.join()
        return process.exitcode or 0, said.read_text().strip()

    @contextmanager
    def _started(self, out: Path, fault: str, at: int) -> Iterator[tuple[BaseProcess, Path]]:
        """A training process, which does not outlive the body; and where its standard error goes."""
        said = out.with_name(f"{out.name}.stderr")
        process = multiprocessing.get_context("fork").Process(
            target=_in_child, args=(self.train, out, fault, at, said)
        )
        process.start()
        try:
            yield process, said
        finally:
            if process.is_alive():
                process.kill()
            process.join()

    def _from_outside(self, name: str, out: Path) -> tuple[int, str]:
        """Ends a training at about the step, harms what it left, and runs the same command again."""
        assert self.at is not None
        with self._started(out, "", 0) as (process, _):
            while _newest_step(out) < self.at:
                if not process.is_alive():
                    raise _NotPlayedError("the training ended before the step of the fault was seen")
                time.sleep(0.002)
            os.kill(process.pid or 0, signal.SIGKILL if name == "kill" else signal.SIGTERM)
            process.join()
        if process.exitcode == 0:
            raise _NotPlayedError("the training ended before the fault")
        if name != "kill":
            checkpoints = open_run(out).checkpoints()
            if len(checkpoints) < 2:
                raise _NotPlayedError("there are fewer than two checkpoints: set checkpoint.every lower")
            _harm(checkpoints[-1].path, lost=name == "lost-checkpoint")
        return self._run(out, "", 0)


def _in_child(train: Train, out: Path, fault: str, at: int, said: Path) -> None:
    die_with_parent()
    with said.open("w") as file, Path(os.devnull).open("w") as nowhere:
        os.dup2(file.fileno(), sys.stderr.fileno())
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    try:
        code = train(out, fault, at)
    except SurefootError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    sys.exit(code)


class _NotPlayedError(Exception):
    """The fault could not be made."""


def _newest_step(out: Path) -> int:
    with suppress(SurefootError, OSError, ValueError):
        steps = read_log(out / "steps").columns["step"]
        return int(steps[-1]) if len(steps) else -1
    return -1


def _harm(checkpoint: Path, *, lost: bool) -> None:
    if lost:
        shutil.rmtree(checkpoint)
        return
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()  # it may be linked elsewhere
    file.write_bytes(data)


_LOWER = ("loss", "error", "mse", "mae", "perplexity", "distance")
_HIGHER = ("accuracy", "auc", "auroc", "f1", "precision", "recall", "r2", "iou")


def _apart(told: dict[str, float], clean: dict[str, float]) -> str:
    """Which metric is not within 2 % of the undisturbed run's, or better where it is known which way is
    better. The validation loss counts if there is nothing plainer; the loss of the last batch does not.
    Metrics of about zero are alike.
    """
    validated = {n: x for n, x in clean.items() if n != "train_loss"}
    for name, then in ({n: x for n, x in validated.items() if n != "loss"} or validated).items():
        now = told.get(name, math.nan)
        lower, higher = (any(w in name.lower() for w in words) for words in (_LOWER, _HIGHER))
        off = (
            now - then if lower and not higher else then - now if higher and not lower else abs(now - then)
        )
        if not (math.isfinite(now) and off <= max(_CLOSE * abs(then), _ROUNDING)):
            return f"{name} is {now:.4g}, and {then:.4g} undisturbed"
    return ""


def survived(played: Sequence[Played]) -> bool:
    """Whether all faults that were played were."""
    return all(one.survived is not False for one in played)
