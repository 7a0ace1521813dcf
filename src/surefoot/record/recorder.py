"""The recorder: what the loop tells the run directory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from surefoot.durable import sync_directory
from surefoot.errors import SurefootError
from surefoot.record.bundles import FAILURES_THAT_DO, LEAVE_A_BUNDLE, leave_bundle
from surefoot.record.events import Event, Events, read_events
from surefoot.record.folder import RunFolder
from surefoot.record.lock import Lock
from surefoot.record.log import StepLog
from surefoot.record.rows import read_log


class Recorder:
    """Holds a run directory and writes its step log and events, for one attempt.

    A disk that takes nothing does not stop it: what it could not write waits in memory.
    """

    def __init__(self, folder: RunFolder, lock: Lock, *, attempt: int) -> None:
        self.folder, self.attempt, self.lock = folder, attempt, lock
        self.closed = False
        self._log = StepLog(folder.steps, str(folder.identity()["id"]))
        self._events = Events(folder.events_file, attempt=attempt)
        self._log.note_events(self._events.num_events)
        for path in (folder.steps, folder.path):
            sync_directory(path)
        self.row = self._log.append

    @property
    def num_rows(self) -> int:
        """Rows of all attempts."""
        return len(self._log)

    def event(self, kind: str, **facts: Any) -> Path | None:
        """Adds an event; the bundle of an incident that it leaves, if it does."""
        event = self._events.add(kind, **facts)
        self._log.note_events(self._events.num_events)
        if kind in LEAVE_A_BUNDLE or (kind == "ended" and facts.get("failure") in FAILURES_THAT_DO):
            return self._leave_bundle(event)
        return None

    def _leave_bundle(self, event: Event) -> Path | None:
        """Writes down what helps to understand an incident. The run does not depend on it, so a disk that
        does not take it is no further trouble.
        """
        with suppress(OSError, SurefootError):
            events, _ = read_events(self.folder.events_file)
            log = read_log(self.folder.steps).columns
            identity = self.folder.identity()
            return leave_bundle(self.folder.incidents, event, identity=identity, events=events, log=log)
        return None

    def seal(self) -> OSError | None:
        """Writes all rows and events that wait; what the disk says if it does not take them."""
        rows, events = self._log.seal(), self._events.write_waiting()
        return rows or events

    def make_durable(self) -> None:
        """Makes what is written durable against a power cut; may be called from another thread."""
        self._log.make_durable()
        self._events.make_durable()

    def close(self) -> None:
        """Makes all durable and lets go of the directory."""
        self.closed = True
        try:
            self._events.write_waiting()
            self._log.close()
            self._events.make_durable()
        finally:
            self._events.close()
            self.lock.release()

    def abandon(self) -> None:
        """Lets go of the directory without waiting for its disk."""
        self.closed = True
        self.lock.release()

    def discard(self) -> None:
        """Takes back a run that never was."""
        self._log.close()
        self._events.close()
        self.folder.discard()
        self.lock.release()
