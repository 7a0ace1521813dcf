"""Release: samples that the guard left out come back, by a person's decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from surefoot.checkpoint.retention import Retention
from surefoot.checkpoint.sound import fences, newest_sound
from surefoot.checkpoint.store import DirectoryStore
from surefoot.errors import RunDirectoryError
from surefoot.guard.history import History, Intervention
from surefoot.identity import digest_of
from surefoot.record.folder import RunFolder
from surefoot.record.ledger import Ledger
from surefoot.record.recorder import Recorder
from surefoot.resume import TERMINAL
from surefoot.run import RunView
from surefoot.segments import branches_of

_GAVE_UP = ("rolled_back", "released")
"""Kinds of events after which the rows logged so far, beyond their step, are given up."""


def release(path: str | Path, ids: Sequence[int] | None = None) -> tuple[list[int], int]:
    """Lets samples take part again, from the newest checkpoint on; one that breaks a step again is left out
    again. The decision becomes part of the state, so the run stays repeatable.

    Args:
        ids: of the samples; None: all that are left out.

    Returns:
        The samples, and the step from which they take part.

    Raises:
        RunDirectoryError: there is no run, it has ended or is going on, or a sample is not left out.
        StateError: no checkpoint is sound.
    """
    folder, view = RunFolder(path), RunView(path)
    if view.status == "running":
        raise RunDirectoryError(
            f"{path} is going on in another process.", fix="Stop it (Ctrl-C keeps its state), then release."
        )
    if view.status in TERMINAL:
        raise RunDirectoryError(
            f"{path} has ended: {view.status}.",
            why="What its samples do no longer matters.",
            fix="Begin another run on the mended data.",
        )
    lock = folder.lock()
    record = None
    try:
        attempt = max((e["attempt"] for e in view.events(all_events=True)), default=1)
        fence = max(fences(folder.checkpoints), default=attempt)
        run = view.identity["id"]
        store = DirectoryStore(
            folder.checkpoints,
            retention=Retention(last=1_000_000),  # what stays is the business of whoever trains
            run=run,
            recipe=digest_of(view.identity),
            fence=fence,
            may_write=lock.check,
        )
        checkpoint, snapshot = newest_sound(store)
        guard = dict(snapshot.facts["stateful"]["guard"])
        history = History.of(snapshot.facts)
        left_out = history.quarantined(checkpoint.step)
        wanted = left_out if ids is None else sorted(set(ids))
        unknown = [i for i in wanted if i not in left_out]
        if unknown or not wanted:
            known = ", ".join(map(str, left_out)) or "none"
            raise RunDirectoryError(
                f"{path}: {f'sample {unknown[0]} is not' if unknown else 'no sample is'} left out"
                f" in the state after step {checkpoint.step}.",
                why=f"Left out are: {known}.",
                fix="Give one of these." if left_out else "There is nothing to release.",
            )
        one = Intervention("release", checkpoint.step, checkpoint.step, 0.0, tuple(wanted))
        history = history.with_(one)
        guard["history"] = history.to_json()
        stateful = {**snapshot.facts["stateful"], "guard": guard}
        ledger = Ledger(snapshot.facts["ledger"], branches_of(snapshot.facts))
        logged, rows = int(view.log()["step"].max(initial=-1)) + 1, len(view.log(all_rows=True)["step"])
        told = [e.get("rows") for e in view.events(all_events=True) if e["kind"] in _GAVE_UP]
        if logged > checkpoint.step and told[-1:] != [rows]:  # these steps were taken without the samples
            ledger = ledger.back_to(checkpoint.step, ledger.value, left=logged)
        changed = replace(
            snapshot,
            facts={**snapshot.facts, "stateful": stateful, **ledger.to_json()},
            metrics=checkpoint.manifest().get("metrics", {}),
        )
        record = Recorder(folder, lock, attempt=attempt)
        kept = store.save(changed, checkpoint.step)
        record.event(
            "released",
            step=checkpoint.step,
            ids=wanted,
            name=kept.path.name,
            interventions=history.num_decided,
            rows=rows,
        )
    finally:
        if record is None:
            lock.release()
        else:
            record.close()
    return wanted, checkpoint.step
