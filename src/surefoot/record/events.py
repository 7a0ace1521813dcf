"""Events: rare facts, one JSON object per line, in order."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Events:
    """Appends to ``events.jsonl``; a line is written by one system call."""

    def __init__(self, path: Path, *, attempt: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._attempt = attempt
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")  # the last writer was killed within a line

    def add(self, kind: str, **facts: Any) -> None:
        """Records that something happened now."""
        event = {"time": round(time.time(), 3), "kind": kind, "attempt": self._attempt}
        event |= {name: _strict(value) for name, value in facts.items()}
        os.write(self._fd, (json.dumps(event) + "\n").encode())

    def sync(self) -> None:
        """Makes everything durable against a power cut."""
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


def read_events(path: Path) -> tuple[list[Event], list[int]]:
    """All events, and the numbers (from 1) of lines that are not whole."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    events: list[Event] = []
    broken: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            event = json.loads(line)
            if not {"kind", "attempt"} <= set(event) or not isinstance(event["attempt"], int):
                raise ValueError
            events.append(event)
        except (ValueError, TypeError):
            broken.append(number)
    return events, broken


def event_lineage(events: list[Event]) -> list[Event]:
    """Events without those of steps that were repeated after going back to a checkpoint."""
    kept: list[Event] = []
    for event in events:
        if event["kind"] == "resumed":
            kept = [e for e in kept if _happened_before(e, event["step"])]
        kept.append(event)
    return kept


def _happened_before(event: Event, done: int) -> bool:
    """Whether it belongs to the first `done` updates: a refused update is told of by its own number
    (from 0), everything else by the number of updates done.
    """
    step = int(event.get("step", 0))
    return step < done if event["kind"] == "skipped" else step <= done
