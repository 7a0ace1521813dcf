"""The run directory: where things lie, whose it is, and that only one process writes to it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from surefoot.errors import RunDirectoryError, StateError

SCHEMA = 1
_PATIENCE_S = 3.0
_PARTS = {"origin", "recipe", "data", "plan", "total_updates", "groups", "environment"}


class RunFolder:
    """Paths within a run directory, and its identity.

    ``run.json`` says what the run is: recipe, data, plan, environment. It is written once.
    """

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, str | os.PathLike):
            raise RunDirectoryError(f"a run directory is a path, not {path!r}.", fix='out="runs/mine"')
        self.path = Path(path)
        self.identity_file = self.path / "run.json"
        self.events_file = self.path / "events.jsonl"
        self.lock_file = self.path / "LOCK"
        self.steps = self.path / "steps"
        self.checkpoints = self.path / "checkpoints"

    def holds_run(self) -> bool:
        """Whether a run lies here.

        Raises:
            RunDirectoryError: something else does.
        """
        if self.identity_file.is_file():
            return True
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file.", fix="Give another output folder.")
        leftovers = {p.name for p in self.path.iterdir()} if self.path.is_dir() else set()
        if leftovers - {"LOCK", ".run.json.tmp"}:
            raise RunDirectoryError(
                f"{self.path} is not empty and holds no run.",
                why=f"It holds {', '.join(sorted(leftovers)[:5])}.",
                fix="Give another output folder.",
            )
        return False

    def identity(self) -> dict[str, Any]:
        """What ``run.json`` says.

        Raises:
            RunDirectoryError: there is no run here.
            StateError: it cannot be read, or a newer version wrote it.
        """
        try:
            identity = json.loads(self.identity_file.read_bytes())
        except FileNotFoundError:
            raise RunDirectoryError(
                f"{self.path} holds no run.", fix="Give a folder that has a run.json."
            ) from None
        except (OSError, ValueError) as error:
            raise StateError(f"{self.identity_file} cannot be read: {error}") from error
        if isinstance(identity, dict) and identity.get("schema") == SCHEMA and not set(identity) >= _PARTS:
            raise StateError(f"{self.identity_file} is damaged: parts of it are missing.")
        if not isinstance(identity, dict) or identity.get("schema") != SCHEMA:
            raise StateError(
                f"{self.identity_file} has a format that this version does not read.",
                fix="Use the version of surefoot that wrote it.",
            )
        return identity

    def create(self, identity: dict[str, Any]) -> None:
        """Writes ``run.json``, wholly or not at all."""
        temporary = self.path / ".run.json.tmp"
        with temporary.open("wb") as file:
            file.write(json.dumps({"schema": SCHEMA, **identity}, indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, self.identity_file)

    def move_aside(self) -> None:
        """Renames a run that lies here to ``<name>.old-<n>``; nothing is removed.

        Raises:
            RunDirectoryError: something else lies here, or the run is in use.
        """
        if not self.holds_run():
            return
        if self.is_running():
            raise RunDirectoryError(f"{self.path} is in use by another process.")
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(aside)

    def is_running(self) -> bool:
        """Whether a process is writing to this run now."""
        try:
            fd = os.open(self.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return not _locked(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)

    def lock(self) -> Lock:
        """Makes the directory if need be and takes it for this process.

        Raises:
            RunDirectoryError: another process has it, or it cannot be made.
        """
        made: list[Path] = []
        try:
            for path in [*reversed(self.path.parents), self.path]:
                if not path.exists():
                    path.mkdir(exist_ok=True)
                    made.append(path)
            fd = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunDirectoryError(f"{self.path} cannot be written to: {error.strerror}.") from None
        give_up = time.monotonic() + _PATIENCE_S  # workers of a killed process take a moment to die
        while not _locked(fd, fcntl.LOCK_EX):
            if time.monotonic() > give_up:
                owner = os.pread(fd, 100, 0).decode(errors="replace").strip() or "unknown"
                os.close(fd)
                raise RunDirectoryError(
                    f"{self.path} is in use by process {owner}.",
                    why="Two processes writing one run would tear it.",
                    fix="Wait for it, stop it, or give another output folder.",
                )
            time.sleep(0.05)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        return Lock(self, fd, made)


class Lock:
    """Holds a run directory until `release` or the end of the process, however it ends."""

    def __init__(self, folder: RunFolder, fd: int, made: list[Path]) -> None:
        self._folder, self._fd, self._made = folder, fd, made

    def release(self) -> None:
        """Lets go."""
        os.close(self._fd)

    def discard(self) -> None:
        """Takes back a run that never was: removes its files, and the folders made for it."""
        for name in ("run.json", ".run.json.tmp", "events.jsonl", "LOCK"):
            (self._folder.path / name).unlink(missing_ok=True)
        for path in (self._folder.steps, self._folder.checkpoints):
            shutil.rmtree(path, ignore_errors=True)
        for path in reversed(self._made):
            path.rmdir()
        self.release()


def _locked(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
