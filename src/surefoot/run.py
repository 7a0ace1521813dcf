"""Looking at a run: reads a run directory, also while it is being written. Needs no torch."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from surefoot.checkpoint.kept import Checkpoint, list_checkpoints
from surefoot.data.plan import Plan
from surefoot.errors import StateError
from surefoot.guard.detect import SAT_OUT
from surefoot.guard.history import History
from surefoot.record.columns import Columns, lineage
from surefoot.record.events import Event, event_lineage, newest_end, read_events
from surefoot.record.folder import RunFolder
from surefoot.record.ledger import ledgers, segments
from surefoot.record.rows import check_log, read_log
from surefoot.segments import begins_of_segments, branches_of, disagree
from surefoot.types import HOLE, Ids


class Finding(NamedTuple):
    """Something in a run directory that is not as it was written. offset: byte in `file`, if known."""

    file: str
    what: str
    offset: int | None = None


class RunView:
    """A run directory, read.

    Raises:
        RunDirectoryError: there is no run in it.
        StateError: its ``run.json`` cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self._folder = RunFolder(path)
        self.identity = self._folder.identity()

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._folder.path

    @cached_property
    def plan(self) -> Plan:
        """Which samples are in which step: ``run.plan.ids(t)`` is int64[B]."""
        return Plan(**self.identity["plan"])

    @property
    def total(self) -> int:
        """Updates in the whole run."""
        return int(self.identity["total_updates"])

    def log(self, *, all_rows: bool = False) -> Columns:
        """The step log as numpy columns, one row per step; see `surefoot.record.columns`.

        Args:
            all_rows: also rows of steps that were repeated after a restart, in the order written.
        """
        return self._rows() if all_rows else lineage(self._rows())

    def _rows(self) -> Columns:
        try:
            return read_log(self._folder.steps).columns
        except StateError:  # verify tells
            return read_log(self._folder.steps / "none").columns

    def events(self, *, all_events: bool = False) -> list[Event]:
        """Rare facts in order: dicts with ``kind``, ``time``, ``attempt`` and what the kind has.

        Args:
            all_events: also those of steps that were repeated after a restart.
        """
        events, _ = read_events(self._folder.events_file)
        return events if all_events else event_lineage(events)

    def checkpoints(self) -> list[Checkpoint]:
        """Checkpoints, oldest first, not verified."""
        return list_checkpoints(self._folder.checkpoints)

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``stopped_early``, ``diverged``, ``preempted``, ``budget`` or
        ``failed``. A run whose process died without a word has failed.
        """
        return self._status(self.events(all_events=True))

    def _status(self, events: list[Event]) -> str:
        if self._folder.is_running():
            return "running"
        return str(newest_end(events).get("status", "failed"))

    def summary(self) -> dict[str, Any]:
        """What ``surefoot show --json`` prints.

        step, samples, epoch: how far the log goes; epoch counts epochs done, with a fraction.
        metrics: name to last value; ``train_loss`` is the last row's. interventions: refused updates and
        rollbacks. quarantined: ids of samples left out, as of the newest checkpoint.
        digest, ledger: of the newest checkpoint, which may lie before `step`; None: it cannot be read.
        lineage: its segments, of which a rollback begins a new one; see `surefoot.record.ledger.Segment`.
        """
        log, everything = self.log(), self.events(all_events=True)
        events = event_lineage(everything)
        step = int(log["step"][-1]) + 1 if len(log["step"]) else 0
        metrics: dict[str, float] = {}
        if step:
            metrics["train_loss"] = float(log["loss"][-1])
        for event in events:
            if event["kind"] == "validated":
                metrics |= {name: float(value) for name, value in event["metrics"].items()}
        kept = self.checkpoints()
        facts = _facts(kept[-1]) if kept else {}
        history = History.of(facts)
        everything_logged = self.log(all_rows=True)
        cost = float(everything_logged["cost"].sum())
        epochs = self.plan.epochs(step)
        ended = newest_end(everything)
        last_diverged = next((e for e in reversed(events) if e["kind"] == "diverged"), {})
        return {
            "run": str(self.path),
            "status": self._status(everything),
            "reason": last_diverged.get("reason") or ended.get("error") or ended.get("reason"),
            "step": step,
            "total_steps": self.total,
            "samples": int(log["samples"][-1]) if step else 0,
            "epoch": int(epochs) if epochs.denominator == 1 else round(float(epochs), 4),
            "metrics": metrics,
            "interventions": _num_refused(log) + history.count("rollback"),
            "quarantined": history.quarantined(step),
            "digest": facts.get("digest"),
            "ledger": facts.get("ledger"),
            "lineage": [s._asdict() for s in segments(branches_of(facts))] if facts or not kept else None,
            "checkpoint_step": kept[-1].step if kept else None,
            "attempts": max((e["attempt"] for e in everything), default=0),
            "train_s": round(float(log["step_s"].sum()), 3),
            "wall_s": round(float(everything_logged["wall_s"].sum()), 3),
            "cost": cost,
            "cost_per_step": cost / step if step else 0.0,
            "cost_per_epoch": cost / float(epochs) if step else 0.0,
            "lr": float(log["lr"][-1]) if step else None,
        }

    def history(self) -> History:
        """What the guard has done, as of the newest checkpoint that can be read."""
        return History.of(next(filter(None, map(_facts, reversed(self.checkpoints()))), {}))

    def verify(self) -> list[Finding]:
        """Checks every byte of every checkpoint, the ledger, the log and the events.

        Returns what is not as it was written; nothing, if all is well.
        """
        events, broken = read_events(self._folder.events_file)
        live = self._folder.is_running()
        ended = bool(events) and events[-1]["kind"] == "ended"
        findings = [
            Finding(os.path.normpath(f"steps/{file}"), f"{what} at byte {offset}", offset)
            for file, offset, what in check_log(
                self._folder.steps,
                run=self.identity["id"],
                live=live,
                ended=ended,
                num_events=len(events) + len(broken),
            )
        ]
        for number, offset in broken:
            what = f"line {number} is not whole or not in its place, at byte {offset}"
            findings.append(Finding("events.jsonl", what, offset))
        begun = next((e for e in events if e["kind"] == "started"), {})
        if begun.get("run", self.identity["id"]) != self.identity["id"]:
            findings.append(Finding("events.jsonl", f"belongs to another run, {begun['run']}", 0))
        findings += self._missing(events)
        attempt = max((e["attempt"] for e in events), default=0)
        kept = self.checkpoints()  # first: the log may grow meanwhile
        log, history = lineage(self._rows()), self.history()
        for checkpoint in kept:
            name = f"checkpoints/{checkpoint.path.name}"
            damage = checkpoint.damage(self.identity["id"])
            facts = {} if damage else _facts(checkpoint)
            if live and not checkpoint.path.is_dir():
                continue  # retention let it go meanwhile
            findings += [
                Finding(f"{name}/{file}".rstrip("/"), what, offset) for file, what, offset in damage
            ]
            if damage:
                continue
            if not History.of(facts).leads_to(history, checkpoint.step) or checkpoint.is_left_by(attempt):
                continue  # the run went back to before it, and the log has what came then
            findings += [Finding(name, what) for what in self._ledger_findings(checkpoint.step, facts, log)]
        if findings and not live and self._folder.is_running():  # it went on meanwhile
            return self.verify()
        return findings

    def _missing(self, events: list[Event]) -> list[Finding]:
        """The newest checkpoint that the events tell of, if neither it nor a later one is there. (A kill
        may come between a checkpoint and its event, so later ones may be there that no event tells of.)
        """
        names = [e["name"] for e in events if e["kind"] in ("checkpointed", "released")]
        newest = max((checkpoint.seq for checkpoint in self.checkpoints()), default=0)
        if not names or newest >= int(names[-1].split("-")[0]):
            return []
        if any(self._folder.quarantine.glob(f"{names[-1]}*")):  # told of when it was put there
            return []
        return [Finding(f"checkpoints/{names[-1]}", "the newest checkpoint is missing")]

    def _ledger_findings(self, step: int, facts: dict[str, Any], log: Columns) -> list[str]:
        """What a state after `step` updates says of ledgers that plan and log do not give."""
        history = History.of(facts)

        def ids(t: int) -> Ids:
            planned = self.plan.ids(t)
            holes = history.holes(t, planned)
            return planned if holes is None else np.where(holes, HOLE, planned)

        told = [("the ledger", step, str(facts["ledger"])), *begins_of_segments(facts)]
        whole = int((log["step"] == np.arange(len(log["step"]))).sum())  # after a gap none is in its place
        made = ledgers({at for _, at, _ in told}, ids, log["permitted"][:whole].tolist())
        found = ["its segments are not those of what the guard did"] if disagree(facts) else []
        return found + [
            f"{what} is {ledger[:12]}..., but plan and log give "
            + (f"{made[at][:12]}..." if at in made else "none")
            for what, at, ledger in told
            if made.get(at) != ledger
        ]


def _num_refused(log: Columns) -> int:
    """Updates that were refused for what they were, not sat out."""
    refused = ~log["permitted"]
    return int((refused & (log["verdict"] != SAT_OUT)).sum() if "verdict" in log else refused.sum())


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        return checkpoint.facts()
    except StateError:
        return {}


def open_run(path: str | Path) -> RunView:
    """A run directory, for reading; see `RunView`."""
    return RunView(path)
