"""Noticing that a run does not move any more, and writing down where every thread stands."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOOKS_S = 1.0


@contextmanager
def stacks_if_stuck(after_s: float) -> Iterator[None]:
    """Prints the stacks of all threads to standard error if the body is not through after that time: for
    what comes before a run has a directory.
    """
    through = threading.Event()

    def watch() -> None:
        if not through.wait(after_s):
            print(f"not through after {after_s:g} s\n{_stacks()}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, name="start-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        through.set()
        thread.join(_LOOKS_S)


def _stacks() -> str:
    """Of all threads but this one."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread 0x{ident:016x} ({names.get(ident, '?')}), most recent call last:\n"
        + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    )


class HangWatch:
    """Writes down the stacks of all threads if `progress` stays the same for `after_s` seconds.

    A thread does that. If it does not get the interpreter lock for so long, because compiled code holds it,
    Python's faulthandler does, which needs none. (It must not while Python code runs: it may crash on what
    changes under it.) They go to ``incidents/hang-<process>.txt``; nothing is ended.

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
            file = path.open("wb", buffering=0)
        except OSError:
            return
        told = False
        seen, since = self._progress(), time.monotonic()
        try:
            while not self._done.wait(min(_LOOKS_S, self._after_s / 4)):
                faulthandler.dump_traceback_later(self._after_s, file=file, exit=False)
                now = self._progress()
                if now != seen:
                    seen, since, told = now, time.monotonic(), False
                elif not told and time.monotonic() - since > self._after_s:
                    told = True
                    with suppress(OSError):  # a full disk may be why; that there was a hang is told
                        file.write(_stacks().encode())
                    self._notice(time.monotonic() - since, path)
        finally:
            faulthandler.cancel_dump_traceback_later()
            file.close()
            self._sweep()
