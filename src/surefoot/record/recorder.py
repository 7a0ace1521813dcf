"""The recorder: what the loop tells the run directory."""

from __future__ import annotations

from typing import Any

from surefoot.record.events import Events
from surefoot.record.folder import Lock, RunFolder
from surefoot.record.log import StepLog


class Recorder:
    """Holds a run directory and writes its step log and events, for one attempt."""

    def __init__(self, folder: RunFolder, lock: Lock, *, attempt: int) -> None:
        self.folder, self.attempt, self._lock = folder, attempt, lock
        self._log = StepLog(folder.steps)
        self._events = Events(folder.events_file, attempt=attempt)
        self.row = self._log.append

    def event(self, kind: str, **facts: Any) -> None:
        """Adds an event."""
        self._events.add(kind, **facts)

    def sync(self) -> None:
        """Makes log and events durable against a power cut."""
        self._log.sync()
        self._events.sync()

    def close(self) -> None:
        """Makes all durable and lets go of the directory."""
        try:
            self._log.close()
            self._events.sync()
        finally:
            self._events.close()
            self._lock.release()

    def discard(self) -> None:
        """Takes back a run that never was."""
        self._log.close()
        self._events.close()
        self._lock.discard()
