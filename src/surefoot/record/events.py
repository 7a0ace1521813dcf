"""Events: rare facts, one JSON object per line, in order.

Each line has a number ``n``, counted from 1, and ends with ``"crc"``: CRC-32 of the text before it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any
from zlib import crc32

Event = dict[str, Any]
_CRC = ', "crc": "'
_GUARD_DID = ("quarantined", "rolled_back", "borne", "released")


class Events:
    """Appends to ``events.jsonl``; a line is written by one system call.

    A line that the disk does not take waits in memory, and is tried again with the next.
    """

    def __init__(self, path: Path, *, attempt: int) -> None:
        known, _ = read_events(path)
        self.num_events = max((event["n"] for event in known), default=0)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._attempt = attempt
        self._waiting: deque[bytes] = deque()
        self._lock = threading.Lock()
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")  # the last writer was killed within a line

    def add(self, kind: str, **facts: Any) -> Event:
        """Records that something happened now; any thread may. Returns it as it will be read."""
        with self._lock:
            self.num_events += 1
            event = {"n": self.num_events, "time": round(time.time(), 3), "kind": kind}
            event |= {"attempt": self._attempt, **{name: _strict(value) for name, value in facts.items()}}
            text = json.dumps(event)[:-1]
            self._waiting.append(f'{text}{_CRC}{crc32(text.encode()):08x}"}}\n'.encode())
            self._write()
        return event

    def write_waiting(self) -> OSError | None:
        """Writes what waits; what the disk says if it does not take it."""
        with self._lock:
            return self._write()

    def _write(self) -> OSError | None:
        try:
            while self._waiting:
                size = os.fstat(self._fd).st_size
                if os.write(self._fd, self._waiting[0]) < len(self._waiting[0]):
                    os.ftruncate(self._fd, size)
                    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._waiting.popleft()
        except OSError as error:
            return error
        return None

    def make_durable(self) -> None:
        """Makes everything written durable against a power cut; may be called from another thread."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self._fd)


def _strict(value: Any) -> Any:
    """JSON has no numbers that are not finite: they become text, which `float` reads."""
    if isinstance(value, dict):
        return {name: _strict(part) for name, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_events(path: Path) -> tuple[list[Event], list[tuple[int, int]]]:
    """All sound events, and (number from 1, byte offset) of lines that are not whole or not in place."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    events: list[Event] = []
    broken: list[tuple[int, int]] = []
    offset, expected = 0, 1
    for number, line in enumerate(lines, start=1):
        event = _event(line)
        if event is not None:
            if expected not in (event["n"], 0):  # lines before it are missing, or stand elsewhere
                broken.append((number, offset))
            expected = event["n"] + 1
            events.append(event)
        elif line or number < len(lines):
            broken.append((number, offset))
            expected = 0  # whether it was an event cannot be told
        offset += len(line) + 1
    if lines[-1] and not broken:  # the newline at the end is missing
        broken.append((len(lines), offset - 1))
    return events, broken


def _event(line: bytes) -> Event | None:
    try:
        text, _, check = line.decode().rpartition(_CRC)
        if not check.endswith('"}') or f"{crc32(text.encode()):08x}" != check.removesuffix('"}'):
            return None
        event: Event = json.loads(text + "}")
    except ValueError:
        return None
    return event


def newest_end(events: list[Event]) -> Event:
    """How the newest attempt ended; {}: it has not, or its process died without a word."""
    last = next((e for e in reversed(events) if e["kind"] not in ("hang", "released")), {})
    return last if last.get("kind") == "ended" else {}


def event_lineage(events: list[Event]) -> list[Event]:
    """Events without those of steps that were repeated after going back to an earlier state. What the guard
    did stays, unless the run was continued from a state from before that.
    """
    kept: list[Event] = []
    for event in events:
        if event["kind"] == "resumed":
            kept = [e for e in kept if _stands(e, event["step"], event.get("interventions", 0))]
        elif event["kind"] == "rolled_back":
            kept = [e for e in kept if e["kind"] in _GUARD_DID or _happened_before(e, event["step"])]
        kept.append(event)
    return kept


def _stands(event: Event, done: int, interventions: int) -> bool:
    """Whether it belongs to a state after `done` updates and so many interventions."""
    if event["kind"] in _GUARD_DID:
        return bool(event["interventions"] <= interventions)
    return _happened_before(event, done)


def _happened_before(event: Event, done: int) -> bool:
    """Whether it belongs to the first `done` updates: a refused update is told of by its own number
    (from 0), everything else by the number of updates done.
    """
    step = int(event.get("step", 0))
    return step < done if event["kind"] in ("skipped", "would_skip") else step <= done
