"""Checkpoints as they lie in a directory: listed, and verified byte by byte. Needs no torch.

::

    checkpoints/<seq>-<step>/
        model.safetensors     what training changes
        frozen.safetensors    what it does not, if anything; one file for all checkpoints, by hard links
        optimizer.safetensors
        state.json
        MANIFEST.json         size and SHA-256 of each file, and of the manifest itself
    checkpoints/<seq>-<step>.pin        made by you: this one stays
    checkpoints/<seq>-<step>.certified  made by the run: enough healthy updates followed
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot.checkpoint.files import difference, read_json, to_json
from surefoot.checkpoint.retention import Kept
from surefoot.errors import FormatError, StateError

SCHEMA = 2
_READS = (2,)
_NAME = re.compile(r"(\d{6,9})-(\d{9,18})")  # what has a higher number was not written by a run


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A committed checkpoint, not yet verified. Ordered by `seq`: by when it was written."""

    seq: int
    step: int
    path: Path

    def manifest(self) -> dict[str, Any]:
        """Its manifest, checked against its own hash; files are not read.

        Raises:
            StateError: it is missing, altered, of another checkpoint, or of a newer format.
        """
        file = self.path / "MANIFEST.json"
        try:
            data = file.read_bytes()
            manifest = json.loads(data)
        except (OSError, ValueError) as error:
            raise StateError(f"{file} cannot be read: {error}") from error
        if not isinstance(manifest, dict) or "self" not in manifest:
            raise StateError(f"{file} is not a manifest.")
        signed = manifest.pop("self")
        whole = data == to_json({**manifest, "self": signed})
        whole = whole and hashlib.sha256(to_json(manifest)).hexdigest() == signed
        if whole and manifest.get("schema") not in _READS:
            raise FormatError(
                f"{self.path} has format {manifest.get('schema')}; this version reads {max(_READS)}.",
                fix="Use the version of surefoot that wrote it.",
            )
        if not whole:
            raise StateError(f"{file} was altered.")
        if (manifest["seq"], manifest["step"]) != (self.seq, self.step):
            raise StateError(f"{self.path} holds the manifest of another checkpoint.")
        return manifest

    def verify(self, run: str | None = None) -> None:
        """Checks every byte.

        Args:
            run: the id of the run it must belong to, if that is known.

        Raises:
            StateError: naming each file that is missing, torn, altered or foreign.
        """
        self.manifest()  # of a format that this version reads
        found = self.damage(run)
        if found:
            raise StateError("; ".join(f"{self.path / file}: {what}" for file, what, _ in found) + ".")

    def damage(self, run: str | None = None) -> list[tuple[str, str, int | None]]:
        """Files that are not as they were written: name, what, and from which byte on, if it is known."""
        try:
            manifest = self.manifest()
        except StateError as error:
            return [("MANIFEST.json", error.what, 0)]
        if run is not None and manifest.get("run", run) != run:
            return [("MANIFEST.json", "belongs to another run", 0)]
        files = manifest["files"]
        try:
            names = [p.name for p in self.path.iterdir()]
        except OSError as error:
            return [("", f"cannot be read: {error.strerror}", None)]
        present = {n for n in names if not n.startswith(".")} - {"MANIFEST.json"}  # .DS_Store, .nfs...
        found: list[tuple[str, str, int | None]] = [
            (name, "the file is foreign", None) for name in sorted(present - set(files))
        ]
        for name, entry in files.items():
            try:
                what, offset = difference(self.path / name, entry)
            except OSError as error:
                found.append((name, f"cannot be read: {error.strerror}", None))
                continue
            if what:
                found.append((name, what, offset))
        return found

    def facts(self) -> dict[str, Any]:
        """The JSON part of the state, checked; tensors are not read.

        Raises:
            StateError: it, or the manifest, is missing or altered.
        """
        file, entry = self.path / "state.json", self.manifest()["files"].get("state.json")
        try:
            what = "is not in the manifest" if entry is None else difference(file, entry)[0]
        except OSError as error:
            what = f"cannot be read: {error.strerror}"
        if what:
            raise StateError(f"{file}: {what}.")
        facts: dict[str, Any] = read_json(file)
        return facts

    def is_left_by(self, attempt: int) -> bool:
        """Whether an attempt has to begin before it: it is an earlier one's, and poisoned."""
        try:
            manifest = self.manifest()
        except StateError:  # it may be on its way out
            return False
        return bool(manifest.get("poisoned")) and manifest.get("fence", 0) < attempt

    def mark(self, kind: str) -> Path:
        """Where a mark of it lies: ``pin`` or ``certified``."""
        return self.path.with_name(f"{self.path.name}.{kind}")

    def kept(self, *, verified: bool) -> Kept:
        """What retention looks at; of a manifest that cannot be read, what its name says."""
        try:
            manifest = self.manifest()
        except StateError:
            manifest, verified = {}, False
        return Kept(
            self.seq,
            self.step,
            time_s=float(manifest.get("time", 0.0)),
            metrics=manifest.get("metrics", {}),
            verified=verified,
            certified=self.mark("certified").exists(),
            pinned=self.mark("pin").exists(),
            poisoned=bool(manifest.get("poisoned")),
        )


def list_checkpoints(path: Path) -> list[Checkpoint]:
    """Committed checkpoints in a directory, oldest first; none if it does not exist."""
    if not path.is_dir():
        return []
    return sorted(
        Checkpoint(int(match[1]), int(match[2]), entry)
        for entry in path.iterdir()
        if (match := _NAME.fullmatch(entry.name)) and entry.is_dir()
    )
