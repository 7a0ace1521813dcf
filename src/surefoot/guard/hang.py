"""Noticing that a run does not move any more, and writing down where every thread stands."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOOKS_S = 1.0


@contextmanager
def stacks_if_stuck(after_s: float) -> Iterator[None]:
    """Prints the stacks of all threads to standard error if the body is not through after that time: for
    what comes before a run has a directory.
    """
    try:
        faulthandler.dump_traceback_later(after_s, exit=False)
    except (OSError, ValueError, AttributeError, RuntimeError):  # standard error is no file
        yield
        return
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class HangWatch:
    """Dumps the stacks of all threads if `progress` stays the same for `after_s` seconds.

    The dump is made by a thread of Python's faulthandler, which needs no interpreter lock: it also comes
    if compiled code holds that for ever. It goes to ``incidents/hang-<process>.txt``; nothing is ended.

    Args:
        progress: any value that changes as long as the run moves; read from another thread.
        notice: called, from that thread, with seconds and file once a hang is seen.
    """

    def __init__(
        self,
        folder: Path,
        *,
        after_s: float,
        progress: Callable[[], object],
        notice: Callable[[float, Path], None],
    ) -> None:
        self._folder, self._after_s = folder, after_s
        self._progress, self._notice = progress, notice
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)

    def __enter__(self) -> HangWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(_LOOKS_S)

    def _sweep(self) -> None:
        """Removes the empty files of processes that were killed, and the folder if nothing is in it."""
        with suppress(OSError):
            for left in self._folder.glob("hang-*.txt"):
                if left.stat().st_size == 0:
                    left.unlink()
            self._folder.rmdir()

    def _watch(self) -> None:
        path = self._folder / f"hang-{os.getpid()}.txt"
        try:
            self._sweep()
            self._folder.mkdir(exist_ok=True)
            file = path.open("wb")
        except OSError:
            return
        told = False
        seen, since = self._progress(), time.monotonic()
        try:
            faulthandler.dump_traceback_later(self._after_s, file=file, exit=False)
            while not self._done.wait(min(_LOOKS_S, self._after_s / 4)):
                now = self._progress()
                if now != seen:
                    seen, since, told = now, time.monotonic(), False
                    faulthandler.dump_traceback_later(self._after_s, file=file, exit=False)
                elif not told and time.monotonic() - since > self._after_s + 0.2:
                    told = True
                    self._notice(time.monotonic() - since, path)
        finally:
            faulthandler.cancel_dump_traceback_later()
            file.close()
            self._sweep()
