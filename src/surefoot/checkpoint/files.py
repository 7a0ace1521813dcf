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

from surefoot.errors import StateError


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Creates a file, which must not exist, and syncs it; its size and SHA-256, hashed on the way.

    On any error the file is worthless: give up the whole directory, since a failed fsync marks pages
    clean that never reached the disk (Rebello et al., ATC 2020).
    """
    sha, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            sha.update(view)
            size += len(view)
            while view:
                view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    return {"bytes": size, "sha256": sha.hexdigest()}


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


def file_hash(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()
