"""The store: keeps states in a directory of checkpoints, laid out as in `kept`.

A checkpoint is written beside its place under a temporary name: files first, each synced, the
manifest last, then the directory is synced, renamed without replacing, and the parent synced. Only
then is it committed; what lies there under a temporary name is swept. Reading checks every byte of
every file against the manifest before any of it is used.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from surefoot.checkpoint.files import difference, rename_new, to_json, write_durably
from surefoot.checkpoint.kept import SCHEMA, Checkpoint, list_checkpoints
from surefoot.checkpoint.retention import LEAST_VERIFIED, Retention, expendable
from surefoot.checkpoint.snapshot import Snapshot, is_finite
from surefoot.checkpoint.tensors import load_tensors, safetensors_chunks
from surefoot.durable import sync_directory
from surefoot.errors import PoisonedError, StateError


class DirectoryStore:
    """Keeps checkpoints in a directory; one process writes at a time.

    Args:
        path: the directory; made when the first checkpoint is written.
        retention: what stays.
        run: id of the run, written into each checkpoint and checked when one is read.
        recipe: digest of what is learned, written into each checkpoint.
        fence: number of this writer; a checkpoint is committed only while `may_write` says so.
        may_write: raises if the directory is no longer this writer's.
    """

    def __init__(
        self,
        path: Path,
        *,
        retention: Retention | None = None,
        run: str | None = None,
        recipe: str = "",
        fence: int = 0,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self._retention = path, retention or Retention()
        self._run, self._recipe, self._fence, self._may_write = run, recipe, fence, may_write
        self._verified: set[int] = set()
        self.protected: int | None = None
        """Seq of a checkpoint that stays until it is known whether it can be certified."""
        self.stuck: dict[str, OSError] = {}
        """Names of checkpoints that should have gone, and why they could not be removed."""

    def save(self, snapshot: Snapshot, step: int) -> Checkpoint:
        """Keeps a state and then lets go of what retention does not keep; returns when it is durable.

        Raises:
            OSError: it could not be written; nothing of it is left.
        """
        self._may_write()
        if not self.path.is_dir():
            self.path.mkdir()
            sync_directory(self.path.parent)
        self._sweep()
        before = self.checkpoints()
        seq = 1 + max((c.seq for c in before), default=0)
        while True:
            name = f"{seq:06d}-{step:09d}"
            temporary, final = self.path / f".tmp-{name}", self.path / name
            if not os.path.lexists(temporary) and not os.path.lexists(final):
                break
            seq += 1  # something else lies there, and cannot be removed or is not ours to remove
        temporary.mkdir()
        try:
            facts = {**snapshot.facts, **snapshot.more({**snapshot.frozen, **snapshot.model})}
            files = {}
            if snapshot.frozen:
                files["frozen.safetensors"] = self._frozen(temporary, snapshot.frozen, before)
            for file, part in (
                ("model.safetensors", safetensors_chunks(snapshot.model)),
                ("optimizer.safetensors", safetensors_chunks(snapshot.optimizer)),
                ("state.json", iter([to_json(facts)])),
            ):
                files[file] = write_durably(temporary / file, part)
            manifest: dict[str, Any] = {
                "schema": SCHEMA, "run": self._run, "recipe": self._recipe, "fence": self._fence,
                "seq": seq, "step": step,
                "time": round(time.time(), 3), "metrics": snapshot.metrics,
                "poisoned": not is_finite(snapshot), "files": files,
            }  # fmt: skip
            manifest["self"] = hashlib.sha256(to_json(manifest)).hexdigest()
            write_durably(temporary / "MANIFEST.json", [to_json(manifest)])
            sync_directory(temporary)
            self._may_write()
            rename_new(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(self.path)
        self._verified.add(seq)
        with suppress(OSError):
            self._retain()
        return Checkpoint(seq, step, final)

    def checkpoints(self) -> list[Checkpoint]:
        """Committed checkpoints, oldest first."""
        return list_checkpoints(self.path)

    def load(self, checkpoint: Checkpoint) -> Snapshot:
        """The state of a checkpoint, verified first.

        Raises:
            StateError: any byte differs from what was written, or its numbers are not finite.
        """
        checkpoint.verify(self._run)
        if checkpoint.manifest().get("poisoned"):
            raise PoisonedError(f"{checkpoint.path} is poisoned: it holds numbers that are not finite.")
        frozen = checkpoint.path / "frozen.safetensors"
        self._verified.add(checkpoint.seq)
        return Snapshot(
            load_tensors(checkpoint.path / "model.safetensors"),
            load_tensors(checkpoint.path / "optimizer.safetensors"),
            checkpoint.facts(),
            frozen=load_tensors(frozen) if frozen.exists() else {},
        )

    def certify(self, checkpoint: Checkpoint) -> None:
        """Marks that enough healthy updates followed; retention then never lets the newest such go.

        Raises:
            OSError: the disk does not take it.
        """
        if checkpoint.path.exists():
            checkpoint.mark("certified").touch()

    def quarantine(self, checkpoint: Checkpoint, where: Path) -> None:
        """Moves a checkpoint that was rejected out of the way, for whoever wants to look at it.

        Raises:
            OSError: it stays where it is.
        """
        where.mkdir(exist_ok=True)
        number, target = 1, where / checkpoint.path.name
        while target.exists():
            number += 1
            target = where / f"{checkpoint.path.name}.{number}"
        rename_new(checkpoint.path, target)
        checkpoint.mark("certified").unlink(missing_ok=True)
        sync_directory(where)

    def _frozen(
        self, temporary: Path, tensors: Mapping[str, Tensor], before: list[Checkpoint]
    ) -> dict[str, Any]:
        """Tensors that training does not change: a link to a file that is there already and holds the same
        bytes. There are two such files, which checkpoints take in turn, so that damage to one of them does
        not reach all checkpoints.
        """
        name = "frozen.safetensors"
        sha = hashlib.sha256()
        for chunk in safetensors_chunks(tensors):
            sha.update(chunk)
        copies: dict[int, tuple[Checkpoint, dict[str, Any]]] = {}  # by inode; the least recently used first
        for checkpoint in before:
            try:
                entry = checkpoint.manifest()["files"].get(name, {})
                if entry.get("sha256") == sha.hexdigest():
                    inode = (checkpoint.path / name).stat().st_ino
                    copies.pop(inode, None)
                    copies[inode] = checkpoint, entry
            except (StateError, OSError):
                continue
        if len(copies) > 1:
            checkpoint, entry = next(iter(copies.values()))
            try:
                if not difference(checkpoint.path / name, entry)[0]:  # each time: it may be damaged by now
                    os.link(checkpoint.path / name, temporary / name)
                    return dict(entry)
            except OSError:  # a file system without links
                pass
        return write_durably(temporary / name, safetensors_chunks(tensors))

    def _retain(self) -> None:
        """What need not stay goes; what cannot be removed is noted, and tried again after the next."""
        protected = self.protected  # read before the marks: the loop marks it, and then protects it no more
        by_seq = {c.seq: c for c in self.checkpoints()}
        kept = [c.kept(verified=c.seq in self._verified) for c in by_seq.values()]
        rules = self._retention
        if rules.last > LEAST_VERIFIED and protected not in sorted(by_seq)[-rules.last :]:
            kept = [replace(k, pinned=True) if k.seq == protected else k for k in kept]
            rules = replace(rules, last=rules.last - (protected in by_seq))  # it takes one's place
        for one in expendable(kept, rules, now_s=time.time()):
            checkpoint = by_seq[one.seq]
            trash = self.path / f".trash-{checkpoint.path.name}"
            try:
                os.rename(checkpoint.path, trash)  # so that a kill leaves no half of it under its name
                checkpoint.mark("certified").unlink(missing_ok=True)
                sync_directory(self.path)
                shutil.rmtree(trash)
            except OSError as error:
                self.stuck.setdefault(checkpoint.path.name, error)

    def _sweep(self) -> None:
        """Removes what lies under a temporary name; what cannot be removed hinders no checkpoint."""
        for entry in self.path.iterdir():
            if entry.name.startswith((".tmp-", ".trash-")):
                with suppress(OSError):
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    else:
                        entry.unlink()


def out_of_space(error: BaseException) -> bool:
    """Whether a write failed for want of room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
