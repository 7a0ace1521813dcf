"""The run directory: where things lie, whose it is, and that only one process writes to it."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from surefoot.durable import sync_directory
from surefoot.errors import FormatError, RunDirectoryError, StateError
from surefoot.record.lock import Lock, is_held, take

SCHEMA = 2


class RunFolder:
    """Paths within a run directory, and its identity.

    ``run.json`` says what the run is: recipe, data, plan, environment. It is written once.
    """

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, str | os.PathLike):
            raise RunDirectoryError(f"a run directory is a path, not {path!r}.", fix='out="runs/mine"')
        self.path = Path(path)
        try:
            self.path.exists()
            os.fsencode(self.path).index(b"\0")
        except OSError as error:
            raise RunDirectoryError(f"{path}: {error.strerror}.", fix="Give another path.") from None
        except ValueError:  # as it should be: no zero byte
            pass
        else:
            raise RunDirectoryError(f"{str(path)!r} is no path: it has a zero byte.")
        self.identity_file = self.path / "run.json"
        self.events_file = self.path / "events.jsonl"
        self.lock_file = self.path / "LOCK"
        self.steps = self.path / "steps"
        self.checkpoints = self.path / "checkpoints"
        self.quarantine = self.path / "quarantine"
        self.incidents = self.path / "incidents"
        self.profiles = self.path / "profiles"
        self.ballast = self.path / "BALLAST"
        self._made: list[Path] = []

    def holds_run(self) -> bool:
        """Whether a run lies here.

        Raises:
            RunDirectoryError: something else does.
        """
        if self.identity_file.is_file() or any(self.checkpoints.glob("*/MANIFEST.json")):
            return True
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file.", fix="Give another output folder.")
        leftovers = {p.name for p in self.path.iterdir()} if self.path.is_dir() else set()
        if leftovers - {"LOCK", ".run.json.tmp", ".LOCK.tmp"}:
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
            data = self.identity_file.read_bytes()
            identity: Any = json.loads(data)
        except (FileNotFoundError, NotADirectoryError):
            raise RunDirectoryError(
                f"{self.path} holds no run.", fix="Give a folder that has a run.json."
            ) from None
        except (OSError, ValueError) as error:
            raise StateError(f"{self.identity_file} cannot be read: {error}") from error
        found: dict[str, Any] = identity if isinstance(identity, dict) else {}
        whole = data == _signed({k: v for k, v in found.items() if k != "self"})
        if whole and found["schema"] != SCHEMA:
            raise FormatError(
                f"{self.identity_file} has a format that this version does not read.",
                why=f"It reads format {SCHEMA}.",
                fix="Use the version of surefoot that wrote it.",
            )
        if not whole:
            raise StateError(f"{self.identity_file} was altered or is torn.", fix="Restore it from a copy.")
        return found

    def create(self, identity: dict[str, Any], *, run: str = "") -> str:
        """Writes ``run.json``, wholly or not at all; returns the run's id, a new one if none is given."""
        run = run or secrets.token_hex(8)
        temporary = self.path / ".run.json.tmp"
        with temporary.open("wb") as file:
            file.write(_signed({"schema": SCHEMA, "id": run, **identity}))
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, self.identity_file)
        for path in {self.path, *(made.parent for made in self._made)}:
            sync_directory(path)
        return run

    def move_aside(self) -> None:
        """Renames a run that lies here to ``<name>.old-<n>``; nothing is removed.

        Raises:
            RunDirectoryError: something else lies here, the run is in use, or it cannot be renamed.
        """
        if not self.holds_run():
            return
        if self.is_running():
            raise RunDirectoryError(
                f"{self.path} is in use by another process.", fix="Wait for it, or give another --out."
            )
        if self.path.name in ("", ".."):  # there is no name to change
            raise RunDirectoryError(
                f"{self.path} cannot be moved aside from within.", fix="Give the folder by its name."
            )
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path} cannot be renamed to {aside.name}: {error.strerror}.",
                why="A run is moved aside as a whole; a mounted folder, say, cannot be.",
                fix="Give a folder within it as --out.",
            ) from error

    def is_running(self) -> bool:
        """Whether a process is writing to this run now."""
        return is_held(self.lock_file)

    def lock(self) -> Lock:
        """Makes the directory if need be and takes it for this process; see `surefoot.record.lock`.

        Raises:
            RunDirectoryError: another process has it, or it cannot be made.
        """
        made: list[Path] = []
        try:
            for path in [*reversed(self.path.parents), self.path]:
                if not path.exists():
                    path.mkdir(exist_ok=True)
                    made.append(path)
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path} cannot be written to: {error.strerror}.", fix="Give another --out."
            ) from error
        self._made = made
        return take(self.lock_file, [self.steps / "rows.bin", self.steps / "tail.bin", self.events_file])

    def discard(self) -> None:
        """Takes back a run that never was: removes its files, and the folders that `lock` made for it."""
        for name in ("run.json", ".run.json.tmp", "events.jsonl", "LOCK", "BALLAST"):
            (self.path / name).unlink(missing_ok=True)
        for path in (self.steps, self.checkpoints, self.incidents, self.profiles):
            shutil.rmtree(path, ignore_errors=True)
        for path in reversed(self._made):
            path.rmdir()


def _signed(identity: dict[str, Any]) -> bytes:
    """JSON that ends with a SHA-256 of what stands before."""
    text = json.dumps(identity, indent=1)
    return (
        json.dumps({**identity, "self": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n"
    ).encode()
