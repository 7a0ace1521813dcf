"""Room on the disk that is given up when it is full."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from surefoot.errors import RunDirectoryError

_LEAST_BYTES, _MOST_BYTES = 1 << 20, 64 << 20


class Ballast:
    """A file that is removed when the disk is full, so that the last state still finds room.

    Args:
        still_ours: raises `RunDirectoryError` if the directory is another process's by now.
    """

    def __init__(self, path: Path, still_ours: Callable[[], None]) -> None:
        self._path, self._still_ours = path, still_ours

    def prepare(self, state_bytes: int) -> None:
        """Takes the room for a state of that size, if there is some and it is not taken yet.

        Raises:
            RunDirectoryError: the directory is another process's.
        """
        if self._path.exists():
            return
        size = min(max(_LEAST_BYTES, state_bytes * 5 // 4), _MOST_BYTES)
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.posix_fallocate(fd, 0, size)
            finally:
                os.close(fd)
        except OSError:
            self.drop()
        try:  # a process that was stopped just here writes into a directory that is another's by now
            self._still_ours()
        except RunDirectoryError:
            self.drop()
            raise

    def drop(self) -> None:
        """Gives the room up, if it can be."""
        with suppress(OSError):
            self._path.unlink()
