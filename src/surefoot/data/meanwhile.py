"""Work that another thread does meanwhile, which it does not matter to lose."""

from __future__ import annotations

import os
import sys
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Meanwhile(Generic[T]):
    """What a function returns, called by another thread. Nobody waits for that but who asks for the result:
    neither the end of the process, nor a signal whose handler raises while the thread begins.

    Args:
        make, of: the function, and what it is called with. It must not matter if it is called in vain.
    """

    def __init__(self, make: Callable[..., T], *of: int) -> None:
        self.of, self._process = of, os.getpid()
        self._made: T | None = None
        self._busy = allocate_lock()
        self._busy.acquire()
        try:
            start_new_thread(self._run, (make,))  # `threading.Thread.start` waits until it runs
        except RuntimeError:  # this process can have no more of them
            self._busy.release()

    def _run(self, make: Callable[..., T]) -> None:
        try:
            self._made = make(*self.of)
        except MemoryError:
            pass  # who needs it makes it, and is told
        finally:
            self._busy.release()

    def result(self) -> T | None:
        """Waits for it. None if it was not made, or if the thread does not go on: this is a fork of its
        process, or at its end.
        """
        if self._process != os.getpid() or sys.is_finalizing():
            return None
        with self._busy:
            return self._made
