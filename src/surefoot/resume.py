"""The run directory at the start: begins a run, or continues one from its newest sound checkpoint."""

from __future__ import annotations

from typing import Any

from surefoot.checkpoint.store import DirectoryStore
from surefoot.errors import RunDirectoryError, StateError
from surefoot.identity import DECIDES_BITS, differences
from surefoot.record.events import read_events
from surefoot.record.folder import RunFolder
from surefoot.record.recorder import Recorder
from surefoot.state import RunState

TERMINAL = ("finished", "stopped_early", "diverged")
"""Statuses after which a run does not go on."""


def begin_or_continue(
    folder: RunFolder, identity: dict[str, Any], state: RunState, store: DirectoryStore
) -> tuple[Recorder | None, str, list[str]]:
    """Begins or continues the run: its recorder (None if it has ended), status if so, and notes."""
    lock = folder.lock()
    try:
        if not folder.holds_run():
            folder.create(identity)
            record = Recorder(folder, lock, attempt=1)
            record.event("started", step=0, environment=identity["environment"])
            return record, "", []
        before = folder.identity()
        _same_run(before, identity, folder)
        events, _ = read_events(folder.events_file)
        notes, checkpoint = _restore(state, store)
        if not checkpoint and any(e["kind"] == "checkpointed" for e in events):
            raise StateError(
                f"{folder.checkpoints} is empty, but the run has kept checkpoints there.",
                why="Starting anew silently would hide that they are lost.",
                fix="Restore the folder from a copy, or start anew with --fresh or another --out.",
            )
        ended = events[-1].get("status", "") if events and events[-1]["kind"] == "ended" else ""
        if ended in TERMINAL and (checkpoint or state.step):
            lock.release()
            return None, ended, notes
        attempt = 1 + max((e["attempt"] for e in events), default=0)
        record = Recorder(folder, lock, attempt=attempt)
    except BaseException:
        lock.release()
        raise
    for line in notes:
        record.event("checkpoint_rejected", step=state.step, reason=line)
    now, then = identity["environment"], before["environment"]
    changed = {k: [then.get(k), now[k]] for k in DECIDES_BITS if then.get(k) != now[k]}
    record.event("resumed", step=state.step, checkpoint=checkpoint, environment_changed=changed)
    where = f"from checkpoint {checkpoint}" if checkpoint else "no checkpoint was completed before"
    notes.append(f"continues at step {state.step} ({where}), attempt {attempt}")
    if changed:
        what = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items())
        notes.append(f"the environment changed ({what}): equal to rounding, not to the bit")
    return record, "", notes


def _restore(state: RunState, store: DirectoryStore) -> tuple[list[str], str]:
    """Restores the newest sound checkpoint: why others were rejected, and its name ('' if none).

    Raises:
        StateError: there are checkpoints, but none is sound.
    """
    rejected: list[str] = []
    for checkpoint in reversed(store.checkpoints()):
        try:
            state.restore(store.load(checkpoint))
        except StateError as error:
            rejected.append(f"checkpoint {checkpoint.path.name} rejected: {error.what}")
            continue
        return rejected, checkpoint.path.name
    if rejected:
        raise StateError(
            "the run has checkpoints, but none is sound.\n  " + "\n  ".join(rejected),
            why="Starting anew silently would throw the run away.",
            fix="Restore the folder from a copy, or start anew with another --out.",
        )
    return [], ""


def _same_run(before: dict[str, Any], now: dict[str, Any], folder: RunFolder) -> None:
    lines = differences(*(d["origin"].get("options", {}) for d in (before, now)))
    if before["environment"]["torch"] != now["environment"]["torch"]:  # may draw other first weights
        now["recipe"]["model"]["initial"] = before["recipe"]["model"].get("initial")
    for part in ("recipe", "data", "plan"):
        lines += differences(before[part], now[part], part)
    if lines:
        raise RunDirectoryError(
            f"{folder.path} holds a run of another recipe:\n    " + "\n    ".join(lines),
            why="Going on with another recipe would be neither run.",
            fix="Give another --out; or take the change back to continue; or add --fresh, which "
            "moves the old run aside.",
        )
