"""Writing files so that they are wholly there or not there at all, also after a power cut."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

from surefoot.errors import StateError

PIECE_BYTES = 1 << 20
"""How closely damage is located."""


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Creates a file, which must not exist, and syncs it; its size, its SHA-256 and the CRC-32 of each
    `PIECE_BYTES` of it, taken on the way.

    On any error the file is worthless: give up the whole directory, since a failed fsync marks pages
    clean that never reached the disk (Rebello et al., ATC 2020).
    """
    sha, size, checks = hashlib.sha256(), 0, Checks()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            sha.update(view)
            checks.update(view)
            size += len(view)
            while view:
                view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    return {"bytes": size, "sha256": sha.hexdigest(), "crc32": checks.values()}


class Checks:
    """CRC-32 of each `PIECE_BYTES` of what is fed to it: they tell where a file was altered, and cost a
    quarter of what SHA-256 does.
    """

    def __init__(self) -> None:
        self._whole: list[int] = []
        self._check = self._filled = 0

    def update(self, data: memoryview) -> None:
        """Feeds more."""
        while data:
            piece = data[: PIECE_BYTES - self._filled]
            self._check = crc32(piece, self._check)
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == PIECE_BYTES:
                self._whole.append(self._check)
                self._check = self._filled = 0

    def values(self) -> list[int]:
        """Those of all pieces, the last of which may be short."""
        return [*self._whole, self._check] if self._filled else list(self._whole)


def difference(path: Path, entry: dict[str, Any]) -> tuple[str, int | None]:
    """What is not as `write_durably` told, and the byte from which on, if it is known; empty if all is.

    Raises:
        OSError: it cannot be read.
    """
    sha, size, checks = hashlib.sha256(), 0, Checks()
    with path.open("rb") as file:
        while chunk := file.read(PIECE_BYTES):
            view = memoryview(chunk)
            sha.update(view)
            checks.update(view)
            size += len(view)
    if size == entry["bytes"] and sha.hexdigest() == entry["sha256"]:
        return "", None
    pairs = zip(checks.values(), entry.get("crc32", []), strict=False)
    piece = next((i for i, (now, then) in enumerate(pairs) if now != then), None)
    at = min(size, entry["bytes"]) if piece is None else piece * PIECE_BYTES
    if piece is None and size == entry["bytes"]:  # of a version that kept no checks
        return "altered", None
    sizes = "" if size == entry["bytes"] else f": {size} bytes, and {entry['bytes']} were written"
    return f"altered at or after byte {at}{sizes}", at


_AT_FDCWD, _NOREPLACE = -100, 1


def rename_new(source: Path, target: Path) -> None:
    """Renames a directory to a name that is not taken.

    Raises:
        FileExistsError: it is. (Plain rename would silently replace an empty directory.)
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = os.fsencode(source), os.fsencode(target)
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL):  # a file system that does not know the flag
            raise OSError(number, os.strerror(number), str(target))
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def to_json(value: Any) -> bytes:
    """JSON for people and machines: indented, and with NaN as in Python."""
    return (json.dumps(value, indent=1) + "\n").encode()


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        StateError: it is missing or torn.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StateError(f"{path} cannot be read: {error}") from error
