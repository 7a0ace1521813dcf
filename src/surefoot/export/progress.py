"""Progress on the terminal: reads the record four times a second, from a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from surefoot.errors import SurefootError
from surefoot.record.events import Event, read_events
from surefoot.record.folder import RunFolder
from surefoot.record.rows import read_newest

_REFRESH_S = 0.25
_LINES_S = (2, 4, 8, 16, 30)
_WINDOW = 256
_HEALED = ("rolled_back", "alarm", "borne", "diverged", "resumed", "ended")


@contextmanager
def progress(path: Path, *, on: bool, console: Console | None = None) -> Iterator[None]:
    """Shows how the run in `path` goes on: a line that is drawn anew where there is a terminal, else a
    plain line after 2, 4, 8, 16 seconds and then every 30. Colour as the terminal and NO_COLOR allow.
    """
    if not on:
        yield
        return
    watcher = _Watcher(path, console or Console(stderr=True))
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()


class _Watcher(threading.Thread):
    def __init__(self, path: Path, console: Console) -> None:
        super().__init__(name="surefoot-progress", daemon=True)
        self._folder, self._console = RunFolder(path), console
        self._done = threading.Event()
        self._events_size = -1
        self._events: list[Event] = []
        self._total = 0

    def stop(self) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        if self._console.is_terminal:
            with Live(console=self._console, auto_refresh=False, transient=True) as live:
                while not self._done.wait(_REFRESH_S):
                    live.update(self.line(), refresh=True)
        else:
            waits = iter(_LINES_S)
            wait = next(waits)
            while not self._done.wait(wait):
                self._console.print(self.line(), soft_wrap=True)
                wait = next(waits, _LINES_S[-1])
        self._console.print(self.line(), soft_wrap=True)

    def line(self) -> Text:
        """What there is to say now; that nothing can be read is no reason to stop a run."""
        try:
            line = describe(self._rows(), self._metrics(), self._total)
            for alarm in alarms(self._events):
                line.append(f" · {alarm}", style="bold red")
            return line
        except (OSError, SurefootError, ValueError) as error:
            return Text(f"progress cannot be read: {error}", style="dim")

    def _rows(self) -> dict[str, Any]:
        if not self._total:
            self._total = int(self._folder.identity()["total_updates"])
        return read_newest(self._folder.steps, _WINDOW)

    def _metrics(self) -> dict[str, float]:
        size = self._folder.events_file.stat().st_size
        if size != self._events_size:
            self._events_size = size
            self._events, _ = read_events(self._folder.events_file)
        validated = [e["metrics"] for e in self._events if e["kind"] == "validated"]
        return {name: float(value) for name, value in validated[-1].items()} if validated else {}


def alarms(events: list[Event]) -> list[str]:
    """What somebody should look at: the last checkpoint failed, nothing moves, an alarm is looked into."""
    found = []
    kept = [e for e in events if e["kind"] in ("checkpointed", "checkpoint_failed")]
    if kept and kept[-1]["kind"] == "checkpoint_failed":
        newest = kept[-1]["newest_good"]
        found.append(f"CHECKPOINT FAILED ({kept[-1]['error']}), newest good: {newest}; trying again")
    if events and events[-1]["kind"] == "hang":
        found.append(f"NOTHING MOVES since {events[-1]['seconds']:.0f} s, see {events[-1]['stacks']}")
    healing = [e for e in events if e["kind"] in ("healing", *_HEALED)]
    if healing and healing[-1]["kind"] == "healing":
        found.append(f"LOOKING INTO {healing[-1]['reason']}: earlier steps are taken again")
    return found


def describe(rows: dict[str, Any], metrics: dict[str, float], total: int) -> Text:
    """The progress line of the newest rows, the last validation and the length of the run."""
    if not len(rows["step"]):
        return Text("preparing the first step ...", style="dim")
    step = int(rows["step"][-1]) + 1
    parts = [
        Text(f"step {step:,}/{total:,}", style="bold"),
        Text(f"{100 * step / total:.0f} %"),
        Text(f"epoch {rows['epoch'][-1] + 1}"),
        Text(f"loss {rows['loss'][-1]:.4g}", style="cyan"),
    ]
    for name, value in metrics.items():
        parts.append(Text(f"val {name} {value:.4g}", style="green"))
    parts.append(Text(f"lr {rows['lr'][-1]:.3g}"))
    seconds = float(rows["step_s"].sum())
    if seconds > 0:
        parts.append(Text(f"{rows['batch_samples'].sum() / seconds:,.0f} samples/s"))
    elapsed = float(rows["time_s"][-1] - rows["time_s"][0])
    if step < total and len(rows["step"]) > 1:
        left = (total - step) * elapsed / (len(rows["step"]) - 1)
        parts.append(Text(f"{duration_text(left)} left"))
    refused = int((~rows["permitted"]).sum())
    if refused:
        parts.append(Text(f"{refused} of the last {len(rows['step'])} refused", style="bold red"))
    return Text(" · ").join(parts)


def duration_text(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    return time.strftime("%-H:%M:%S" if seconds >= 3600 else "%-M:%S", time.gmtime(seconds))
