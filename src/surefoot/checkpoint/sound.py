"""Which checkpoints a run may go on from."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from surefoot.checkpoint.kept import Checkpoint, list_checkpoints
from surefoot.checkpoint.snapshot import Snapshot
from surefoot.checkpoint.store import DirectoryStore
from surefoot.errors import StateError


def fences(path: Path) -> list[int]:
    """Numbers of the attempts that wrote checkpoints: events may be lost."""
    found = []
    for checkpoint in list_checkpoints(path):
        with suppress(StateError):
            found.append(int(checkpoint.manifest().get("fence", 0)))
    return found


def newest_sound(store: DirectoryStore) -> tuple[Checkpoint, Snapshot]:
    """The newest checkpoint whose every byte is as it was written.

    Raises:
        StateError: there is none.
    """
    kept, whys = store.checkpoints(), list[str]()
    for checkpoint in reversed(kept):
        try:
            check_fence(checkpoint, kept)
            return checkpoint, store.load(checkpoint)
        except StateError as error:
            whys.append(error.what)
    raise StateError(
        f"{store.path} holds no sound checkpoint.",
        why="\n       ".join(whys) or "There is none at all.",
        fix="Continue the run first; surefoot verify RUN says what is damaged.",
    )


def check_fence(checkpoint: Checkpoint, kept: list[Checkpoint]) -> None:
    """Refuses what a process wrote after another had taken the run over: its fencing number is below that
    of an older checkpoint.
    """
    fence = checkpoint.manifest().get("fence", 0)
    for older in kept:
        if older.seq >= checkpoint.seq:
            return
        try:
            above = older.manifest().get("fence", 0) > fence
        except StateError:
            continue
        if above:
            raise StateError(f"{checkpoint.path} was written by a process that had lost the run.")
