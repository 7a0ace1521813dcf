"""Checkpoints as they lie in a directory: listed, and verified byte by byte. Needs no torch.

::

    checkpoints/<seq>-<step>/
        model.safetensors optimizer.safetensors state.json
        MANIFEST.json         size and SHA-256 of each file, and of the manifest itself
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot.checkpoint.files import file_hash, read_json, to_json
from surefoot.errors import StateError

SCHEMA = 1
_NAME = re.compile(r"(\d{6,})-(\d{9,})")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A committed checkpoint, not yet verified. Ordered by `seq`: by when it was written."""

    seq: int
    step: int
    path: Path

    def verify(self) -> None:
        """Checks every byte.

        Raises:
            StateError: naming the first file that is missing, torn or altered.
        """
        manifest = read_json(self.path / "MANIFEST.json")
        if not isinstance(manifest, dict) or "self" not in manifest:
            raise StateError(f"{self.path / 'MANIFEST.json'} is not a manifest.")
        if manifest.get("schema") != SCHEMA:
            raise StateError(
                f"{self.path} has format {manifest.get('schema')}; this version reads {SCHEMA}.",
                fix="Use the version of surefoot that wrote it.",
            )
        signed = manifest.pop("self")
        if hashlib.sha256(to_json(manifest)).hexdigest() != signed:
            raise StateError(f"{self.path / 'MANIFEST.json'} was altered.")
        if (manifest["seq"], manifest["step"]) != (self.seq, self.step):
            raise StateError(f"{self.path} holds the manifest of another checkpoint.")
        present = {p.name for p in self.path.iterdir()} - {"MANIFEST.json"}
        if present != set(manifest["files"]):
            odd = sorted(present ^ set(manifest["files"]))
            raise StateError(f"{self.path}: missing or foreign files: {', '.join(odd)}.")
        for name, entry in manifest["files"].items():
            size, sha = file_hash(self.path / name)
            if size != entry["bytes"] or sha != entry["sha256"]:
                raise StateError(
                    f"{self.path / name}: {size} bytes with SHA-256 {sha[:12]}...; the manifest "
                    f"says {entry['bytes']} bytes, {entry['sha256'][:12]}..."
                )

    def facts(self) -> dict[str, Any]:
        """The JSON part of the state, unverified: for showing."""
        facts = read_json(self.path / "state.json")
        if not isinstance(facts, dict):
            raise StateError(f"{self.path / 'state.json'} is not a state.")
        return facts


def list_checkpoints(path: Path) -> list[Checkpoint]:
    """Committed checkpoints in a directory, oldest first; none if it does not exist."""
    if not path.is_dir():
        return []
    return sorted(
        Checkpoint(int(match[1]), int(match[2]), entry)
        for entry in path.iterdir()
        if (match := _NAME.fullmatch(entry.name)) and entry.is_dir()
    )
