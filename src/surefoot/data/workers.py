"""Processes that fetch: torch's loader, with its workers watched and ended by us."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from surefoot.types import Tree

LOOKS_S = 1.0
"""How often whoever waits for a worker looks whether it is alive."""


def _processes(workers: Any) -> list[Any]:
    """The processes behind torch's iterator, which has no public name for them."""
    return list(getattr(workers, "_workers", ()))


def started(loader: DataLoader[Tree]) -> Iterator[Tree]:
    """The loader's iterator, with its workers running.

    Torch has the death of a worker raise an error in whatever the main thread does at that moment, within
    an update too. That handler is taken back: whoever waits for the worker notices.
    """
    if threading.current_thread() is not threading.main_thread():
        return _not_held_up(iter(loader))
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return _not_held_up(iter(loader))
    finally:
        signal.signal(signal.SIGCHLD, before)


def _not_held_up(workers: Any) -> Iterator[Tree]:
    """Once a worker has died, torch asks an event that they share whether they are to end: behind a lock,
    for which it waits for ever if that worker held it. They are ended without this (`end`).
    """
    if hasattr(workers, "_workers_done_event"):
        workers._workers_done_event = threading.Event()
    found: Iterator[Tree] = workers
    return found


def next_of(workers: Iterator[Tree], timeout_s: float, watch: Watch) -> tuple[Tree, dict[str, Any]]:
    """The next rows; or, if none come, which workers died or hang."""
    begun = time.monotonic()
    while True:
        watch.deadline = begun + timeout_s + LOOKS_S
        try:
            return next(workers), {}
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            told = str(error)
            if watch.ended:
                return None, {"reason": "hung", "workers": watch.ended}
            if "in DataLoader worker process" in told:  # an error within the dataset
                raise
            if not isinstance(error, RuntimeError):  # while a tensor was taken over: the batch is lost
                return None, {"reason": "died", "workers": [p.pid for p in _processes(workers)]}
            if "exited unexpectedly" not in told and "timed out after" not in told:
                raise
        finally:
            watch.deadline = None
        processes = _processes(workers)
        dead = {p.pid: p.exitcode for p in processes if p.exitcode is not None}
        if dead:
            codes = [dead[pid] for pid in sorted(dead)]
            return None, {"reason": "died", "workers": sorted(dead), "exit_codes": codes}
        if time.monotonic() - begun > timeout_s:
            return None, {"reason": "hung", "workers": [p.pid for p in processes]}


class Watch:
    """Ends workers, from a thread, that hold up whoever waits for them beyond `deadline`.

    Torch's own time limit does not hold while it takes a tensor over: the file descriptor of its memory
    comes from the worker, over a socket, without any limit; a worker that was stopped never answers.

    The thread knows the processes only: were it the last to let go of torch's iterator, and so of tensors,
    while the interpreter ends, that would abort the process.

    ended: the processes that were ended.
    """

    def __init__(self, workers: Any) -> None:
        self.deadline: float | None = None
        self.ended: list[int] = []
        self._processes = _processes(workers)
        self._over = threading.Event()
        threading.Thread(target=self._look, name="worker-watch", daemon=True).start()

    def _look(self) -> None:
        while not self._over.wait(LOOKS_S):
            deadline = self.deadline
            if deadline is not None and time.monotonic() > deadline:
                self.ended = [p.pid for p in self._processes]
                _kill(self._processes)
                return

    def close(self) -> None:
        """No longer."""
        self._over.set()


def end(workers: Any) -> None:
    """Ends worker processes without waiting for one that hangs."""
    _kill(_processes(workers))


def _kill(processes: list[Any]) -> None:
    for process in processes:
        if process.exitcode is None:
            process.kill()


def as_it_is(fetched: Tree) -> Tree:
    """Torch's default would turn arrays into tensors and tuples into lists."""
    return fetched


def _outlive_one(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def enter(_: int) -> None:
    """A worker leaves Ctrl-C to the main process, and dies with it even if that is killed.

    A scheduler sends SIGTERM to all processes of a job: the first is for the main process, which then
    finishes its step; a second one, as torch's loader sends to a worker that hangs, ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive_one)
    try:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    except (OSError, AttributeError):  # not Linux: torch's own watchdog ends it within seconds
        pass
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # killed before that, so that no signal will come
        os._exit(1)
