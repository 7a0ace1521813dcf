"""The store: keeps states in a directory of checkpoints, laid out as in `kept`.

A checkpoint is written beside its place under a temporary name: files first, each synced, the
manifest last, then the directory is synced, renamed without replacing, and the parent synced. Only
then is it committed; what lies there under a temporary name is swept. Reading checks every byte of
every file against the manifest before any of it is used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from surefoot.checkpoint.files import sync_directory, to_json, write_durably
from surefoot.checkpoint.kept import SCHEMA, Checkpoint, list_checkpoints
from surefoot.checkpoint.tensors import load_tensors, safetensors_chunks


@dataclass(frozen=True)
class Snapshot:
    """A whole state: tensors by name, and everything else as JSON."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]


class DirectoryStore:
    """Keeps checkpoints in a directory; one process writes at a time.

    Args:
        path: the directory; made when the first checkpoint is written.
        keep_last: how many of the newest stay.
    """

    def __init__(self, path: Path, *, keep_last: int = 3) -> None:
        self.path, self._keep_last = path, keep_last

    def save(self, snapshot: Snapshot, step: int) -> Checkpoint:
        """Keeps a state and then lets go of the oldest ones; returns when it is durable."""
        self.path.mkdir(exist_ok=True)
        self._sweep()
        seq = 1 + max((c.seq for c in self.checkpoints()), default=0)
        name = f"{seq:06d}-{step:09d}"
        temporary, final = self.path / f".tmp-{name}", self.path / name
        temporary.mkdir()
        try:
            chunks = {
                "model.safetensors": safetensors_chunks(snapshot.model),
                "optimizer.safetensors": safetensors_chunks(snapshot.optimizer),
                "state.json": iter([to_json(snapshot.facts)]),
            }
            files = {file: write_durably(temporary / file, part) for file, part in chunks.items()}
            manifest: dict[str, Any] = {"schema": SCHEMA, "seq": seq, "step": step, "files": files}
            manifest["self"] = hashlib.sha256(to_json(manifest)).hexdigest()
            write_durably(temporary / "MANIFEST.json", [to_json(manifest)])
            sync_directory(temporary)
            os.rename(temporary, final)  # fails if `final` exists: directories are not replaced
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(self.path)
        self._retain()
        return Checkpoint(seq, step, final)

    def checkpoints(self) -> list[Checkpoint]:
        """Committed checkpoints, oldest first."""
        return list_checkpoints(self.path)

    def load(self, checkpoint: Checkpoint) -> Snapshot:
        """The state of a checkpoint, verified first.

        Raises:
            StateError: any byte differs from what was written.
        """
        checkpoint.verify()
        return Snapshot(
            load_tensors(checkpoint.path / "model.safetensors"),
            load_tensors(checkpoint.path / "optimizer.safetensors"),
            checkpoint.facts(),
        )

    def _retain(self) -> None:
        for checkpoint in self.checkpoints()[: -self._keep_last]:
            trash = self.path / f".trash-{checkpoint.path.name}"
            os.rename(checkpoint.path, trash)  # so that a kill leaves no half of it under its name
            sync_directory(self.path)
            shutil.rmtree(trash)

    def _sweep(self) -> None:
        for entry in self.path.iterdir():
            if entry.name.startswith((".tmp-", ".trash-")):
                shutil.rmtree(entry)
