"""When and how the state of a run is kept, and what happens if the disk does not take it."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, field

from surefoot.checkpoint.ballast import Ballast
from surefoot.checkpoint.kept import Checkpoint
from surefoot.checkpoint.store import DirectoryStore, out_of_space
from surefoot.checkpoint.writer import Writer, Written
from surefoot.data.plan import Cadence
from surefoot.record.recorder import Recorder
from surefoot.state import RunState

_CERTIFIED_AFTER = 350
"""More than the guard goes back from an alarm: so there is a state to start its replays from."""
_FEW_REFUSED = 8
_LEAST_AUTO_S = 2.0
_WORTH_RESERVING = 16 << 20
_PATIENCE_S = 30.0
_TRIES_S = (0.0, 1.0, 4.0)
"""Pauses before each try to write the last state of a run."""
_BACK_OFF_S = (1.0, 60.0)


@dataclass(frozen=True)
class Auto:
    """A cadence by what a checkpoint costs: as often as the share of time that they take stays below
    `overhead`, but at most `risk_s` seconds apart.
    """

    overhead: float
    risk_s: float

    def interval_s(self, cost_s: float | None) -> float:
        """Seconds between checkpoints that cost `cost_s` each (None: not known yet)."""
        least = _LEAST_AUTO_S if cost_s is None else max(_LEAST_AUTO_S, cost_s / self.overhead)
        return min(least, self.risk_s)


@dataclass
class _Asked:
    """What was so when a state was handed to the writer."""

    num_refused: int
    validated_at: int
    stall_s: float = 0.0


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint on its way to being certified."""

    checkpoint: Checkpoint
    num_refused: int


@dataclass
class Keeper:
    """Keeps the state while the loop goes on; the loop calls `look` after each step.

    every: updates, seconds, or by cost. deadline_s: how long a run that was asked to stop may take to
    write its state. newest: the newest good checkpoint that this attempt knows of. poisoned: a state held
    numbers that are not finite, and the run cannot go on. due_step: the next, if steps decide, else 0.
    """

    state: RunState
    record: Recorder
    writer: Writer
    store: DirectoryStore
    every: Cadence | float | Auto
    total: int
    deadline_s: float
    ballast: Ballast
    newest: Checkpoint | None = None
    poisoned: bool = False
    due_step: int = 0
    _reserved: bool = False
    _last: float = field(default_factory=time.monotonic)
    _cost_s: float | None = None
    _failures: int = 0
    _retry_at: float = 0.0
    _candidate: _Candidate | None = None
    _asked: dict[int, _Asked] = field(default_factory=dict)
    _is_kept: tuple[int, int] | None = None
    _told_stuck: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if isinstance(self.every, Cadence):
            self.due_step = self.every.after(self.state.step)
        if self.newest is not None:
            self._is_kept = (self.newest.step, self.state.validated_at)

    def due(self) -> bool:
        """Whether a checkpoint is due after this step; the end of the run has its own."""
        step = self.state.step
        if step >= self.total:
            return False
        if self._failures:
            return time.monotonic() >= self._retry_at
        if isinstance(self.every, Cadence):
            if step < self.due_step:
                return False
            self.due_step = self.every.after(step)
            return True
        if self.writer.reserving:  # a moment later it is much cheaper
            return False
        if isinstance(self.every, Auto) and self._asked:  # what one costs is known once it is written; and
            return False  # a second one beside it would be copied into fresh memory, which takes longest
        every = self.every.interval_s(self._cost_s) if isinstance(self.every, Auto) else self.every
        return time.monotonic() - self._last >= every

    def look(self) -> None:
        """Takes note of what the writer has done since."""
        if not self._reserved:  # after the first step the optimizer has its state
            self._reserved = True
            if self.state.num_bytes() > _WORTH_RESERVING:
                self.writer.reserve(self.state.snapshot())
        while self.writer.written:
            self._settle(self.writer.written.popleft())
        candidate = self._candidate
        if candidate and self.state.step >= candidate.checkpoint.step + _CERTIFIED_AFTER:
            if self.state.num_refused - candidate.num_refused < _FEW_REFUSED:
                with suppress(OSError):  # then a later one will be
                    self.store.certify(candidate.checkpoint)
            self._candidate, self.store.protected = None, None

    def keep(self, *, patience_s: float = _PATIENCE_S) -> None:
        """Has the state written in the background. Takes as long as copying it in memory; but states that
        were asked for by their step do not take one another's place: the loop waits for a while instead.
        """
        begun = time.perf_counter()
        if isinstance(self.every, Cadence):
            self.writer.make_room(min(patience_s, _PATIENCE_S))
        self._last = time.monotonic()
        trouble = self.record.seal()
        if trouble is not None:
            self._failed(trouble)
            return
        self._retry_at = math.inf  # until it is known what becomes of this one
        state = self.state
        self._asked.pop(state.step, None)
        asked = self._asked[state.step] = _Asked(state.num_refused, state.validated_at)
        self.writer.submit(state.snapshot(), state.step)
        asked.stall_s = time.perf_counter() - begun

    def settle(self) -> None:
        """Waits, for a while, until nothing is being written."""
        self.writer.drain(_PATIENCE_S)
        self.look()

    def went_back(self) -> None:
        """The run went back to an earlier state: keeps it, before it goes on from there, so that whoever
        continues the run does not come from a state that was given up.
        """
        self._candidate, self.store.protected = None, None
        if isinstance(self.every, Cadence):
            self.due_step = self.every.after(self.state.step)
        self.keep()
        self.settle()
        self.poisoned = False  # what was: a state that was given up

    def finish(self, *, hurry: bool) -> bool:
        """Keeps the state and waits until it is durable; whether it is.

        A disk that does not take it is tried again, with the ballast released; if in a `hurry`, only until
        the deadline.
        """
        give_up = time.monotonic() + self.deadline_s
        if self.writer.drain(self.deadline_s if hurry else None):
            self.look()
        self.poisoned = False  # of an earlier state
        if not self._failures and self._is_kept == (self.state.step, self.state.validated_at):
            return True
        for wait_s in _TRIES_S:
            time.sleep(wait_s)
            self.keep(patience_s=max(0.0, give_up - time.monotonic()) if hurry else _PATIENCE_S)
            left = max(0.0, give_up - time.monotonic())
            if not self.writer.drain(left if hurry else None):
                return False
            self.look()
            if not self._failures:
                return True
            if hurry and time.monotonic() > give_up:
                return False
        return False

    def _settle(self, done: Written) -> None:
        while True:  # those asked for before it gave way to it
            step = next(iter(self._asked))
            asked = self._asked.pop(step)
            if step == done.step:
                break
        if done.error is not None or done.checkpoint is None:
            self._failed(done.error)
            return
        self._failures = 0
        self._cost_s = asked.stall_s + done.write_s
        facts = {"name": done.checkpoint.path.name, "seconds": round(done.seconds, 6)}
        facts["stall_s"] = round(asked.stall_s, 6)
        if done.poisoned:
            self.poisoned = True
            self.record.event("checkpoint_poisoned", step=done.step, **facts)
            return
        self.newest = done.checkpoint
        self._is_kept = (done.step, asked.validated_at)
        if self._candidate is None:
            self._candidate = _Candidate(done.checkpoint, asked.num_refused)
            self.store.protected = done.checkpoint.seq
        self.record.event("checkpointed", step=done.step, **facts)
        for name, error in list(self.store.stuck.items()):
            if name not in self._told_stuck:
                self._told_stuck.add(name)
                told = f"{type(error).__name__}: {error}"
                self.record.event("checkpoint_stuck", step=done.step, name=name, error=told)
        self.ballast.prepare(self.state.num_bytes())

    def _failed(self, error: Exception | None) -> None:
        self._failures += 1
        first, most = _BACK_OFF_S
        wait_s = min(most, first * 2.0 ** (self._failures - 1))
        self._retry_at = time.monotonic() + wait_s
        if error is not None and out_of_space(error):
            self.ballast.drop()  # the room for what follows
        kept = "none yet" if self.newest is None else f"at step {self.newest.step}"
        self.record.event(
            "checkpoint_failed",
            step=self.state.step,
            error=f"{type(error).__name__}: {error}",
            tries=self._failures,
            retry_s=wait_s,
            newest_good=kept,
        )
