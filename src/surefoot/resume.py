"""The run directory at the start: begins a run, or continues one from its newest sound checkpoint."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surefoot.checkpoint.kept import Checkpoint
from surefoot.checkpoint.retention import Retention
from surefoot.checkpoint.sound import check_fence, fences
from surefoot.checkpoint.store import DirectoryStore
from surefoot.environment import DECIDES_BITS, differing
from surefoot.errors import FormatError, PoisonedError, RunDirectoryError, StateError
from surefoot.identity import differences, digest_of
from surefoot.mending import identity_of, put_away_log
from surefoot.record.events import Event, read_events
from surefoot.record.folder import RunFolder
from surefoot.record.lock import Lock
from surefoot.record.recorder import Recorder
from surefoot.record.rows import read_log
from surefoot.state import RunState

_OTHERWISE = (
    "Give another --out; or take the change back to continue; or add --fresh, which moves the old "
    "run aside."
)
TERMINAL = ("finished", "stopped_early", "diverged")
"""Statuses after which a run does not go on."""
Rejected = tuple[Checkpoint, StateError]


@dataclass
class Opened:
    """A run directory, taken for this process.

    record: None if the run has ended already. environment_changed: in what decides about bits. ended: its
    status then. checkpoint: the one that the state was restored from. notes: lines for people.
    """

    store: DirectoryStore
    record: Recorder | None = None
    environment_changed: bool = False
    ended: str = ""
    checkpoint: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)


def begin_or_continue(
    folder: RunFolder, identity: dict[str, Any], state: RunState, retention: Retention
) -> Opened:
    """Begins or continues the run.

    Raises:
        RunDirectoryError: the directory holds another run, or another process has it.
        StateError: state has been kept, but none of it is sound; nothing was changed.
    """
    lock = folder.lock()
    fresh = False
    recipe = digest_of(identity)

    def store(run: str, fence: int) -> DirectoryStore:
        return DirectoryStore(
            folder.checkpoints,
            retention=retention,
            run=run,
            recipe=recipe,
            fence=fence,
            may_write=lock.check,
        )

    try:
        fresh = not folder.holds_run()
        if fresh:
            run = folder.create(identity)
            record = Recorder(folder, lock, attempt=1)
            record.event("started", step=0, run=run, environment=identity["environment"])
            return Opened(store(run, 1), record)
        before, mended = identity_of(folder, identity, recipe)
        same_run(before, identity, folder.path)
        events, _ = read_events(folder.events_file)
        attempt = 1 + max([e["attempt"] for e in events] + fences(folder.checkpoints), default=0)
        mended += put_away_log(folder)
        opened = Opened(store(before["id"], attempt), notes=mended)
        rejected = _restore(state, opened, events, folder)
        last = events[-1] if events and events[-1]["kind"] == "ended" else {}
        ended = last.get("status", "")
        if ended == "diverged" or (ended in TERMINAL and state.step == last["step"]):
            opened.ended = ended
            opened.notes += [f"checkpoint {c.path.name} rejected: {error.what}" for c, error in rejected]
            lock.release()
            return opened
        opened.record = Recorder(folder, lock, attempt=attempt)
    except OSError as error:
        if fresh:
            with suppress(OSError):
                folder.discard()
        lock.release()
        raise StateError(
            f"{folder.path} cannot be written to or read: {error}.", fix="Make room, or mend the disk."
        ) from error
    except BaseException:
        lock.release()
        raise
    now, then = identity["environment"], before["environment"]
    changed = differing(then, now)
    opened.environment_changed = bool(changed) or any(k not in then for k in DECIDES_BITS)
    _tell(opened, rejected, changed, state, folder, lock)
    return opened


def _restore(state: RunState, opened: Opened, events: list[Event], folder: RunFolder) -> list[Rejected]:
    """Restores the newest sound checkpoint; those that were rejected, and why. A run that was stopped when
    its state was not finite, before it had kept another, begins anew.

    Raises:
        StateError: there are or were checkpoints, but none is sound.
    """
    kept = opened.store.checkpoints()
    rejected: list[Rejected] = []
    for checkpoint in reversed(kept):
        try:
            check_fence(checkpoint, kept)
            state.restore(opened.store.load(checkpoint))
        except FormatError:
            raise
        except StateError as error:
            rejected.append((checkpoint, error))
            continue
        opened.checkpoint = checkpoint
        return rejected
    had_sound = any(e["kind"] == "checkpointed" for e in events)
    if rejected and (had_sound or not all(isinstance(error, PoisonedError) for _, error in rejected)):
        lines = [f"checkpoint {c.path.name} rejected: {error.what}" for c, error in rejected]
        raise StateError(
            "the run has checkpoints, but none is sound.\n  " + "\n  ".join(lines),
            why="Starting anew silently would throw the run away.",
            fix="Restore the folder from a copy, or start anew with another --out.",
        )
    if had_sound:
        raise StateError(
            f"{folder.checkpoints} is empty, but the run has kept checkpoints there.",
            why="Starting anew silently would hide that they are lost.",
            fix="Restore the folder from a copy, or start anew with --fresh or another --out.",
        )
    if not events and len(read_log(folder.steps).columns["step"]):
        raise StateError(
            f"{folder.events_file} is missing or damaged, and there is no checkpoint.",
            why="The run has taken steps; whether their state was kept cannot be told.",
            fix="Restore the folder from a copy, or start anew with --fresh or another --out.",
        )
    return rejected


def _tell(
    opened: Opened,
    rejected: list[Rejected],
    changed: dict[str, list[Any]],
    state: RunState,
    folder: RunFolder,
    lock: Lock,
) -> None:
    """What was found, as events and notes; moves what was rejected into quarantine."""
    assert opened.record is not None
    record, checkpoint = opened.record, opened.checkpoint
    for note in opened.notes:
        record.event("mended", step=state.step, reason=note)
    name = checkpoint.path.name if checkpoint else ""
    for bad, error in rejected:
        reason = f"checkpoint {bad.path.name} rejected: {error.what}"
        poisoned = isinstance(error, PoisonedError)
        if not poisoned:
            with suppress(OSError):  # then it stays where it is
                opened.store.quarantine(bad, folder.quarantine)
            moved = "It could not be moved" if bad.path.exists() else "Moved"
            reason += f" {moved} to {folder.quarantine.name}/."
        record.event("checkpoint_rejected", step=state.step, reason=reason, poisoned=poisoned, used=name)
        opened.notes.append(reason)
    done = state.guard.history.num_decided
    record.event(
        "resumed", step=state.step, checkpoint=name, environment_changed=changed, interventions=done
    )
    where = f"from checkpoint {name}" if name else "no checkpoint was completed before"
    opened.notes.append(f"continues at step {state.step} ({where}), attempt {record.attempt}")
    if lock.took_over:
        note = f"taken over from process {lock.took_over}, which had not moved for a while"
        record.event("took_over", step=state.step, owner=lock.took_over)
        opened.notes.append(note + "; if it wakes up it can no longer write")
    if changed:
        what = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items())
        opened.notes.append(f"the environment changed ({what}): equal to rounding, not to the bit")


def same_run(before: dict[str, Any], now: dict[str, Any], path: Path, *, fix: str = _OTHERWISE) -> None:
    """Whether two identities are of one run.

    Raises:
        RunDirectoryError: they are not; it shows where they differ.
    """
    lines = differences(*(d["origin"].get("options", {}) for d in (before, now)))
    if differing(before["environment"], now["environment"]):  # may draw or round other first weights
        now["recipe"]["model"]["initial"] = before["recipe"]["model"].get("initial")
    for part in ("recipe", "data", "plan"):
        lines += differences(before[part], now[part], part)
    if lines:
        raise RunDirectoryError(
            f"{path} holds a run of another recipe:\n    " + "\n    ".join(lines),
            why="Going on with another recipe would be neither run.",
            fix=fix,
        )
