"""The lock of a run directory: one process writes at a time, and one that has lost it cannot.

The file ``LOCK`` is held by `flock`, which ends with the process however that ends, and touched once a
second. A process that finds it held but not touched for 15 seconds (its holder is stopped, or cut off from
the file system) takes the run over: it puts a lock file of its own in that place, and copies in the place
of the files that the holder has open. If the holder wakes up it writes into files without a name, notices,
and ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from surefoot.errors import RunDirectoryError

_PATIENCE_S = 3.0
_BEAT_S = 1.0
_TAKEOVER_S = 15.0


def take(file: Path, opened: Sequence[Path]) -> Lock:
    """Takes the lock.

    Args:
        opened: files that a holder has open, to be replaced by copies if the lock is taken over.

    Raises:
        RunDirectoryError: a living process has it, or the file cannot be made.
    """
    fd = _opened(file)
    begun, took_over, seen = time.monotonic(), "", os.fstat(fd).st_mtime_ns
    while not (_locked(fd, fcntl.LOCK_EX) and _is(fd, file)):
        if not _is(fd, file):  # another process has put a new file there, or removed it
            os.close(fd)
            fd = _opened(file)
            begun, seen = time.monotonic(), os.fstat(fd).st_mtime_ns
            continue
        waited, touched = time.monotonic() - begun, os.fstat(fd).st_mtime_ns != seen
        owner = os.pread(fd, 100, 0).decode(errors="replace").strip() or "unknown"
        if touched and waited > _PATIENCE_S:  # workers of a killed process take a moment to die
            os.close(fd)
            raise RunDirectoryError(
                f"{file.parent} is in use by process {owner}.",
                why="Two processes writing one run would tear it.",
                fix="Wait for it, stop it, or give another output folder.",
            )
        if not touched and waited > _TAKEOVER_S:
            mine = _take_over(fd, file, opened)
            os.close(fd)
            fd = mine if mine is not None else _opened(file)
            if mine is not None:
                took_over = owner
                break
            begun, seen = time.monotonic(), os.fstat(fd).st_mtime_ns
        time.sleep(0.05)
    with suppress(OSError):  # on a full disk it is nobody's name
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    return Lock(file, fd, took_over)


def _opened(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunDirectoryError(
            f"{file.parent} cannot be written to: {error.strerror}.", fix="Give another --out."
        ) from error


def _is(fd: int, file: Path, *, if_gone: bool = False) -> bool:
    """Whether that is still the file of this name; `if_gone`, if there is none."""
    try:
        mine, now = os.fstat(fd), os.stat(file)
    except FileNotFoundError:
        return if_gone
    return (mine.st_dev, mine.st_ino) == (now.st_dev, now.st_ino)


def _take_over(stale: int, file: Path, opened: Sequence[Path]) -> int | None:
    """The lock file of this process, put in the place of the stale one; None if another was quicker."""
    temporary = file.with_name(f".{file.name}.tmp")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if not (_locked(fd, fcntl.LOCK_EX) and _is(fd, temporary) and _is(stale, file)):
        os.close(fd)
        return None
    os.rename(temporary, file)
    for one in opened:
        if one.exists():
            copy = one.with_name(f".{one.name}.tmp")
            shutil.copyfile(one, copy)
            os.rename(copy, one)
    return fd


class Lock:
    """A lock that is held until `release` or the end of the process, however it ends.

    took_over: the process from which it was taken, or ``""``. lost: it was taken from this one; nothing may
    be written any more.
    """

    def __init__(self, file: Path, fd: int, took_over: str = "") -> None:
        self._file, self._fd, self.took_over = file, fd, took_over
        self.lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_S):
            try:
                self.check()
                os.utime(self._fd)
            except RunDirectoryError:
                return
            except OSError:  # a disk that takes nothing: the lock holds all the same
                continue

    def check(self) -> None:
        """Raises if the run is another's now.

        Raises:
            RunDirectoryError: it is.
        """
        self.lost = self.lost or not _is(self._fd, self._file, if_gone=True)
        if self.lost:
            raise RunDirectoryError(
                f"{self._file.parent} was taken over by another process.",
                why="This one did not move for a while, as if it had been stopped.",
                fix="Leave the run to the other one.",
            )

    def release(self) -> None:
        """Lets go."""
        self._released.set()
        self._thread.join(_BEAT_S)
        os.close(self._fd)


def is_held(file: Path) -> bool:
    """Whether a process holds the lock now."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _locked(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _locked(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
