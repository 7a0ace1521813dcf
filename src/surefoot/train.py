"""The loop: from the first step that is not done yet to the end of the run.

Read this first, then `train_step`. A batch comes from the feed, `train_step` attempts an update, its row
goes to the record, and every so often the model is validated and the state kept.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from surefoot.checkpoint.store import DirectoryStore
from surefoot.data.feed import Feed
from surefoot.data.plan import Cadence
from surefoot.errors import RecipeError, SurefootError
from surefoot.guard.guard import Stop
from surefoot.measure.evaluate import Evaluation
from surefoot.measure.readings import Readings
from surefoot.optim.schedules import Resolved
from surefoot.record.recorder import Recorder
from surefoot.state import RunState
from surefoot.train_step import Attempt, Parts, train_step
from surefoot.types import Minibatch, Outcome, Slots


class _NotWaiting(BaseException):
    """Raised by a signal out of the wait for a batch, where the state is whole."""


@dataclass
class StopRequest:
    """Whether somebody asked for a stop at the next step boundary, and who. waiting: the loop waits for
    a batch, which may take long and changes nothing, so that a signal may end the wait.
    """

    reason: str = ""
    waiting: bool = False

    def __call__(self) -> bool:
        """Whether."""
        return bool(self.reason)


@dataclass
class Run:
    """A run, ready to go on: what `build` joins from a recipe and operations.

    total: updates in the whole run. validate: when, besides at its end. keep_every: updates, or
    seconds, between checkpoints. fresh: nothing of it was kept before.
    """

    parts: Parts
    state: RunState
    feed: Feed
    schedule: Resolved
    total: int
    store: DirectoryStore
    record: Recorder
    evaluation: Evaluation | None
    validate: Cadence | None
    keep_every: Cadence | float
    early_stopping_metric: str
    fresh: bool
    readings: Readings[_Label]
    stop: StopRequest = field(default_factory=StopRequest)
    status: str = "running"


@dataclass(frozen=True, slots=True)
class _Label:
    """What the host knows of a row before its numbers arrive."""

    slots: Slots
    samples: int
    lr: float
    num_micro: int
    data_wait_s: float
    step_s: float


def steps(run: Run) -> Iterator[Outcome]:
    """Attempts updates until the run ends; `run.status` then says how.

    Every way out of the loop leaves the directory in order: a request to stop, or a caller that stops
    iterating, keeps the state; an error leaves the last checkpoint as it is.
    """
    try:
        with _signals(run.stop):
            run.status = yield from _attempt(run)
            _end(run)
    except GeneratorExit:
        run.status = "preempted"
        _end(run, reason="the caller left the loop")
        raise
    except Exception as error:
        if not (run.fresh and run.state.step == 0):
            _fail(run, error)
            raise
        run.record.discard()  # nothing was learned: leave nothing behind
        if isinstance(error, SurefootError | OSError | MemoryError | torch.OutOfMemoryError):
            raise
        raise first_failure("first step", error) from error
    except BaseException as error:
        _fail(run, error)
        raise


def first_failure(what: str, error: Exception) -> RecipeError:
    """What goes wrong when model, objective and data first meet is nearly always one of them."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not {"surefoot", "torch"} & set(Path(f.filename).parts)]
    where = [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in theirs[-3:]]
    return RecipeError(
        f"the {what} failed: {type(error).__name__}: {error}",
        why="\n       ".join(where),
        fix="Try it on two samples by hand: objective(model, data.fetch(numpy.arange(2))).",
    )


def _attempt(run: Run) -> Generator[Outcome, None, str]:
    """Updates from `state.step` on; returns the status that the run ends with."""
    if _validation_due(run) and _validate(run) is None:
        return "preempted"
    with closing(run.feed.batches(run.state.step, run.total)) as batches:  # else workers outlive errors
        return (yield from _updates(run, batches))


def _updates(run: Run, batches: Iterator[Minibatch]) -> Generator[Outcome, None, str]:
    state, parts, record = run.state, run.parts, run.record
    next_validation = run.validate.after(state.step) if run.validate else run.total + 1
    keep_due = _keeper(run)
    boundary = time.perf_counter()
    while state.step < run.total and not state.stopped_early:
        if parts.strategy.agree(run.stop()):
            return "preempted"
        asked = time.perf_counter()
        try:
            batch = _wait_for(batches, run.stop)
        except (_NotWaiting, RuntimeError):  # or a worker that the same signal ended
            if run.stop():
                return "preempted"
            raise
        data_wait_s = time.perf_counter() - asked
        slots = batch.slots
        multiplier = run.schedule(state.step, cuts=state.lr_cuts)
        attempt = train_step(parts, batch, multiplier)
        state.step += 1
        state.samples += slots.num_samples

        now = time.perf_counter()
        state.elapsed_s += now - boundary
        lr = parts.base_lr[0] * multiplier
        label = _Label(slots, state.samples, lr, attempt.num_micro, data_wait_s, now - boundary)
        boundary = now
        verdict = _settle(run, label, attempt)
        outcome = Outcome(
            slots.step, slots.epoch, state.samples, lr, attempt.loss, attempt.grad_norm,
            attempt.update_ratio, attempt.permitted, parts.model, batch,
        )  # fmt: skip
        if verdict is not None:
            yield outcome
            record.event("diverged", step=state.step, reason=verdict.reason, fix=verdict.fix)
            return "diverged"
        if state.step >= next_validation or state.step == run.total:
            next_validation = run.validate.after(state.step) if run.validate else run.total + 1
            outcome = replace(outcome, metrics=_validate(run))
            boundary = time.perf_counter()
        yield outcome
        if _validation_due(run):
            return "preempted"  # a stop was asked for while validating
        if keep_due(state.step):
            if not keep(run):
                return "diverged"
            boundary = time.perf_counter()
    return "stopped_early" if state.stopped_early else "finished"


def _wait_for(batches: Iterator[Minibatch], stop: StopRequest) -> Minibatch:
    try:
        stop.waiting = True
        return next(batches)
    finally:
        stop.waiting = False


def _settle(run: Run, label: _Label | None, attempt: Attempt | None) -> Stop | None:
    """Writes the rows whose numbers have arrived: with arguments those that are due, else all."""
    state, verdict = run.state, None
    if label is None or attempt is None:
        arrived = run.readings.rest()
    else:
        numbers = (attempt.loss, attempt.grad_norm, attempt.update_ratio, attempt.permitted)
        scale = () if attempt.loss_scale is None else (attempt.loss_scale,)
        arrived = run.readings.put(label, numbers + scale)
    for row, (loss, grad_norm, ratio, permitted, *loss_scale) in arrived:
        slots, scale_used = row.slots, loss_scale[0] if loss_scale else 1.0
        run.record.row((
            slots.step, run.record.attempt, slots.epoch, row.samples, slots.num_samples,
            row.num_micro, int(permitted), row.lr, loss, grad_norm, ratio, scale_used,
            row.data_wait_s, row.step_s, time.time(),
        ))  # fmt: skip
        if permitted:
            state.ledger.extend(slots.step, slots.ids)
        else:
            state.num_refused += 1
            run.record.event(
                "skipped", step=slots.step, reason=_why_refused(run, loss, grad_norm), loss=loss,
                grad_norm=grad_norm,
            )  # fmt: skip
        verdict = run.parts.guard.review(step=slots.step, permitted=bool(permitted)) or verdict
    return verdict


def _why_refused(run: Run, loss: float, grad_norm: float) -> str:
    if not math.isfinite(loss):
        return "loss is not finite"
    if math.isfinite(grad_norm):
        return "the optimizer's update is not finite"
    fp16 = run.parts.precision.scale is not None
    return "fp16 overflow: loss scale halved" if fp16 else "gradient is not finite"


def _validation_due(run: Run) -> bool:
    """Whether the last attempt ended between an update and the validation that follows it."""
    step = run.state.step
    if run.evaluation is None or step == 0 or run.state.validated_at == step:
        return False
    return step == run.total or (run.validate is not None and run.validate.after(step - 1) == step)


def _validate(run: Run) -> dict[str, float] | None:
    """Evaluates the model; what follows from it for the rate and for stopping early goes into the
    state. None if there is nothing to validate on, or if a stop was asked for meanwhile.
    """
    state = run.state
    if run.evaluation is None:
        return None
    begun = time.perf_counter()
    metrics = run.evaluation(run.parts.model, stop=run.stop)
    if metrics is None:
        return None
    state.metrics, state.validated_at = metrics, state.step
    seconds = round(time.perf_counter() - begun, 6)
    run.record.event("validated", step=state.step, metrics=metrics, seconds=seconds)
    if state.plateau is not None and run.schedule.plateau is not None:
        begins, piece = run.schedule.plateau
        if state.step >= begins and state.plateau.spent(metrics[piece.metric]):
            state.lr_cuts += 1
            run.record.event("rate_cut", step=state.step, metric=piece.metric, cuts=state.lr_cuts)
    if state.early_stopping is not None:
        spent = state.early_stopping.spent(metrics[run.early_stopping_metric])
        state.stopped_early = spent and state.step < run.total
    return metrics


def _keeper(run: Run) -> Callable[[int], bool]:
    """Tells after each step whether a checkpoint is due, by steps or by the clock."""
    every = run.keep_every
    if isinstance(every, Cadence):
        due = every.after(run.state.step)

        def by_step(step: int) -> bool:
            nonlocal due
            if step < due:
                return False
            due = every.after(step)
            return step < run.total

        return by_step

    last = time.monotonic()

    def by_clock(step: int) -> bool:
        nonlocal last
        if time.monotonic() - last < every:
            return False
        last = time.monotonic()
        return step < run.total

    return by_clock


def keep(run: Run) -> bool:
    """Keeps the state in the store, and makes the log up to it durable first. Weights that are not
    finite are not worth keeping: whether they were kept.
    """
    begun = time.perf_counter()
    _settle(run, None, None)
    run.record.sync()
    if not run.parts.updater.finite():
        reason = "the weights are not finite: an update overflowed, or the caller changed them"
        run.record.event("diverged", step=run.state.step, reason=reason)
        return False
    checkpoint = run.store.save(run.state.snapshot(), run.state.step)
    run.record.event(
        "checkpointed",
        step=run.state.step,
        name=checkpoint.path.name,
        seconds=round(time.perf_counter() - begun, 6),
    )
    return True


def _end(run: Run, **facts: Any) -> None:
    state = run.state
    if not keep(run):
        run.status = "diverged"
    run.record.event(
        "ended",
        status=run.status,
        step=state.step,
        samples=state.samples,
        seconds=round(state.elapsed_s, 3),
        **({"reason": run.stop.reason} if run.stop.reason and not facts else facts),
    )
    run.record.close()


def _fail(run: Run, error: BaseException) -> None:
    """Notes an error. The state is not kept: it may be half-way through a step."""
    run.status = "preempted" if isinstance(error, KeyboardInterrupt) else "failed"
    what = f"{type(error).__name__}: {error}"
    run.record.event("ended", status=run.status, step=run.state.step, error=what)
    run.record.close()


@contextmanager
def _signals(stop: StopRequest) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a stop at the next step boundary; a second SIGINT interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop():
            raise KeyboardInterrupt
        stop.reason = signal.Signals(number).name
        if stop.waiting:
            raise _NotWaiting

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
