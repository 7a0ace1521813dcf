"""The writer: keeps snapshots in a store from a thread of its own, while training goes on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from surefoot.checkpoint.kept import Checkpoint
from surefoot.checkpoint.snapshot import Snapshot
from surefoot.checkpoint.store import DirectoryStore

_PAGE = 4096
_WARM_EVERY_S = 10.0
_LEAVES_S = 1.0


@dataclass(frozen=True)
class Written:
    """What became of a snapshot. checkpoint: None if it could not be kept, because of `error`. poisoned: it
    is kept, but not to go on from.

    seconds: from its submission until it was durable. write_s: of these, writing.
    """

    step: int
    checkpoint: Checkpoint | None
    error: Exception | None
    poisoned: bool
    seconds: float
    write_s: float


@dataclass
class _Job:
    snapshot: Snapshot
    step: int
    begun: float
    staging: _Staging


class _Staging:
    """Memory for one copy of a state, used again and again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, snapshot: Snapshot) -> None:
        """Takes the memory for a copy of such a state."""
        self._buffers = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in snapshot.tensors()}
        for buffer in self._buffers.values():  # touch each page; not by torch: see `snapshot`
            buffer.reshape(-1).view(torch.uint8).numpy().fill(0)

    def keep_warm(self) -> None:
        """Reads a byte of every page. What lies idle for a minute is taken away by some hosts (of virtual
        machines, say), and the next copy into it is twenty times slower: see the lab book.
        """
        for buffer in self._buffers.values():
            np.add.reduce(buffer.reshape(-1).view(torch.uint8).numpy()[::_PAGE])

    def forget(self) -> None:
        """Lets go of the memory."""
        self._buffers = {}

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with all tensors copied to the host: training may go on."""
        copies: dict[str, Tensor] = {}
        for name, tensor in snapshot.tensors():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
            copies[name] = buffer.copy_(tensor.detach())
        self._buffers = copies
        return replace(
            snapshot,
            model={name: copies[f"model:{name}"] for name in snapshot.model},
            frozen={name: copies[f"frozen:{name}"] for name in snapshot.frozen},
            optimizer={name: copies[f"optimizer:{name}"] for name in snapshot.optimizer},
        )


class Writer:
    """Writes one snapshot at a time; one more may wait, and a newer one takes its place.

    `submit` copies the state and returns; what became of it is in `written`, to be looked at after each
    step. The thread is a daemon: a process that must end is not held up by a disk that hangs.

    Args:
        before: called in the thread before each write: makes what a checkpoint speaks of durable.
    """

    def __init__(self, store: DirectoryStore, *, before: Callable[[], None] = lambda: None) -> None:
        self.written: deque[Written] = deque()
        self._store, self._before = store, before
        self._free = [_Staging(), _Staging()]
        self._waiting: _Job | None = None
        self._busy = self.reserving = self._over = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def reserve(self, snapshot: Snapshot) -> None:
        """Takes memory for the first copy, from a thread: faulting in fresh pages takes several times as
        long as copying.
        """
        with self._changed:
            staging = self._free.pop()
            self.reserving = True

        def take() -> None:
            try:
                staging.reserve(snapshot)
            except (MemoryError, RuntimeError):  # `submit` will find out
                staging.forget()
            with self._changed:
                self._free.append(staging)
                self.reserving = False
                self._changed.notify_all()

        threading.Thread(target=take, name="reserve", daemon=True).start()

    def submit(self, snapshot: Snapshot, step: int) -> None:
        """Copies the state and has it written. It must not change until this returns."""
        begun = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._free)
            staging = self._waiting.staging if self._waiting is not None else self._free.pop()
            self._waiting = None  # newest wins
        try:
            job = _Job(staging.copy(snapshot), step, begun, staging)
        except (MemoryError, RuntimeError):  # no room for a copy: write while the loop waits
            staging.forget()
            with self._changed:
                self._free.append(staging)
            self.drain()
            self._write(_Job(snapshot, step, begun, staging))
            return
        with self._changed:
            self._waiting = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def make_room(self, deadline_s: float) -> bool:
        """Waits until no snapshot waits, so that the next takes no other's place; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None, deadline_s)

    def drain(self, deadline_s: float | None = None) -> bool:
        """Waits until all is written; whether it was, before the deadline."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and self._waiting is None, deadline_s)

    def close(self) -> None:
        """Ends the thread once it has written what it was given; does not wait for a disk that hangs."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            idle = not self._busy and self._waiting is None
        if self._thread is not None and idle:
            self._thread.join(_LEAVES_S)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._over, _WARM_EVERY_S)
                job, self._waiting, self._busy = self._waiting, None, self._waiting is not None
                idle = list(self._free)
                if job is None and self._over:
                    return
            if job is None:
                for staging in idle:
                    staging.keep_warm()
                continue
            self._write(job)
            with self._changed:
                self._free.append(job.staging)
                self._busy = False
                self._changed.notify_all()

    def _write(self, job: _Job) -> None:
        began, checkpoint, failure, poisoned = time.perf_counter(), None, None, False
        try:
            self._before()
            checkpoint = self._store.save(job.snapshot, job.step)
            poisoned = bool(checkpoint.manifest()["poisoned"])
        except Exception as error:  # told to the loop, which decides
            failure = error
        now = time.perf_counter()
        self.written.append(Written(job.step, checkpoint, failure, poisoned, now - job.begun, now - began))
