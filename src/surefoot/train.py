"""The loop: from the first step that is not done yet to the end of the run.

Read this first, then `train_step`. A batch comes from the feed, `train_step` attempts an update, its row
goes to the record, and every so often the model is validated and the state kept.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
import traceback
from collections.abc import Generator, Iterator, MutableSequence, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from surefoot.data.feed import Feed, leave_out
from surefoot.data.plan import Cadence
from surefoot.errors import RecipeError, StateError, SurefootError, failure_class
from surefoot.guard.detect import FINE, GRADIENT_SPIKE, LOSS_SPIKE, NOT_FINITE, SAT_OUT
from surefoot.guard.guard import Stop
from surefoot.guard.hang import HangWatch
from surefoot.guard.review import Alarm
from surefoot.heal import EVERY, Healer, Row, StopAskedError
from surefoot.keep import Keeper
from surefoot.measure.evaluate import Evaluation
from surefoot.measure.readings import Readings
from surefoot.optim.precision import LossScale
from surefoot.optim.schedules import Resolved
from surefoot.record.recorder import Recorder
from surefoot.state import RunState
from surefoot.stopping import Budget, NoLongerWaiting, StopRequest, signals_ask
from surefoot.train_step import Attempt, Parts, train_step
from surefoot.types import Minibatch, Outcome, Slots

_WARN_EVERY = 1000
_LEAVE_S = 10.0
"""How long a process that has lost the run waits for its writer to notice."""


class Silence:
    """A record that keeps nothing: of updates that are taken again."""

    attempt = 0

    def row(self, values: Sequence[int | float]) -> None:
        """Forgotten."""

    def event(self, kind: str, **facts: Any) -> None:
        """Forgotten."""


@dataclass
class Run:
    """A run, ready to go on: what `build` joins from a recipe and operations.

    total: updates in the whole run. validate: when, besides at its end. fresh: nothing of it was kept
    before. price_per_s: of a second of this machine, or 0. hang_after_s: without a step or a batch of
    validation, after which the threads' stacks are written down. threads_before: of this process, for
    torch's kernels, to be put back.
    """

    parts: Parts
    state: RunState
    feed: Feed
    schedule: Resolved
    total: int
    keeper: Keeper
    healer: Healer
    record: Recorder
    told: Recorder | Silence
    evaluation: Evaluation | None
    validate: Cadence | None
    budget: Budget
    price_per_s: float
    hang_after_s: float
    early_stopping_metric: str
    threads_before: int
    fresh: bool
    readings: Readings[_Label]
    rows: MutableSequence[Row]
    stop: StopRequest = field(default_factory=StopRequest)
    status: str = "running"
    blames: bool = True
    warned: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Label:
    """What the host knows of a row before its numbers arrive."""

    slots: Slots
    samples: int
    lr: float
    num_micro: int
    data_wait_s: float
    step_s: float
    wall_s: float


def steps(run: Run) -> Generator[Outcome, None, None]:
    """Attempts updates until the run ends; `run.status` then says how.

    Every way out of the loop leaves the directory in order: a request to stop, or a caller that stops
    iterating, keeps the state; an error leaves the last checkpoint as it is.
    """
    run.stop.grace_s, run.stop.give_up = run.keeper.deadline_s, lambda: _give_up(run)
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with signals_ask(run.stop), _watched(run):
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
    finally:  # the process is the caller's
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        torch.set_num_threads(run.threads_before)


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
    guard = run.parts.guard
    while True:
        if guard.pending is not None:
            status = _heal(run, guard.pending)
            if status:
                return status
        if _validation_due(run) and _validate(run) is None:
            return "preempted"
        with closing(run.feed.batches(run.state.step, run.total)) as batches:  # else workers outlive errors
            status = yield from _updates(run, batches)
        if status:
            return status


def _updates(run: Run, batches: Iterator[Minibatch]) -> Generator[Outcome, None, str]:
    """Updates until the run ends, or, with an empty status, until the guard's alarm."""
    state, parts, record = run.state, run.parts, run.record
    next_validation = run.validate.after(state.step) if run.validate else run.total + 1
    keeper = run.keeper
    begun = row_before = boundary = time.perf_counter()
    while state.step < run.total and not state.stopped_early:
        if parts.strategy.agree(run.stop()):
            return "preempted"
        wall_s = time.perf_counter() - begun
        run.stop.budget = run.budget.reached(state.step, wall_s=wall_s, cost=wall_s * run.price_per_s)
        if run.stop.budget:
            return "budget"
        if record.lock.lost:
            record.lock.check()
        asked = time.perf_counter()
        try:
            batch = _wait_for(batches, run.stop)
        except (NoLongerWaiting, RuntimeError):  # or a worker that the same signal ended
            if run.stop():
                return "preempted"
            raise
        data_wait_s = time.perf_counter() - asked
        batch, multiplier, attempt = _update(run, batch)
        slots = batch.slots

        now = time.perf_counter()
        state.elapsed_s += now - boundary
        lr = parts.base_lr[0] * multiplier
        label = _Label(
            slots, state.samples, lr, attempt.num_micro, data_wait_s, now - boundary, now - row_before
        )  # fmt: skip
        boundary = row_before = now
        verdict = _settle(run, label, attempt)
        outcome = Outcome(
            slots.step, slots.epoch, state.samples, lr, attempt.loss, attempt.grad_norm,
            attempt.update_ratio, attempt.permitted, parts.model, batch,
        )  # fmt: skip
        if isinstance(verdict, Alarm):
            _settle(run, None, None)
            parts.guard.pending = verdict
            yield outcome
            return ""
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
        if state.step % EVERY == 0 and parts.guard.heals:
            _settle(run, None, None)
            parts.guard.pending = run.healer.remember()
            boundary = time.perf_counter()
        keeper.look()
        if keeper.poisoned and parts.guard.heals:
            keeper.poisoned = False
            parts.guard.pending = run.healer.unsound()
        if parts.guard.pending is not None:
            return ""
        if keeper.poisoned:
            reason = "weights, or what the optimizer keeps for them, are not finite"
            record.event("diverged", step=state.step, reason=reason)
            return "diverged"
        if keeper.due():
            _settle(run, None, None)
            keeper.keep()
            boundary = time.perf_counter()
    return "stopped_early" if state.stopped_early else "finished"


def _update(run: Run, batch: Minibatch) -> tuple[Minibatch, float, Attempt]:
    """One update: the batch without what is in quarantine, the schedule's multiplier, what came of it."""
    state, history = run.state, run.parts.guard.history
    multiplier = run.schedule(state.step, cuts=state.lr_cuts)
    if history.interventions:
        multiplier = history.multiplier(state.step, multiplier)
        holes = history.holes(state.step, batch.slots.ids)
        batch = batch if holes is None else leave_out(batch, holes)
    attempt = train_step(run.parts, batch, multiplier)
    state.step += 1
    state.samples += batch.slots.num_samples
    return batch, multiplier, attempt


def _heal(run: Run, alarm: Alarm) -> str:
    """Goes back to a healthy state and on from there; the status, if the run ends now."""
    guard = run.parts.guard
    run.keeper.settle()
    whole = run.state.snapshot().copy()

    def replay(until: int, rows: list[Row] | None = None, *, known: bool = False) -> Alarm | Stop | None:
        return _replay(run, until, [] if rows is None else rows, known=known)

    try:
        done = run.healer.heal(alarm, replay)
    except StopAskedError:
        run.state.restore(whole)  # with the alarm still pending
        return "preempted"
    if done is None:
        run.state.restore(whole)
        guard.reviewed.told_slow = True
        run.told.event("alarm", step=alarm.step + 1, detector=alarm.detector, reason=alarm.reason)
    guard.pending = None
    if isinstance(done, Stop):
        run.told.event("diverged", step=run.state.step, reason=done.reason, fix=done.fix)
        return "diverged"
    if done is None or "at" not in done:  # the run goes on from where it is
        if done is not None:
            run.told.event("borne", **done, interventions=guard.history.num_decided)
        return ""
    run.told.event("rolled_back", **done, interventions=guard.history.num_decided)
    run.keeper.went_back()
    return ""


def _replay(run: Run, until: int, rows: list[Row], *, known: bool) -> Alarm | Stop | None:
    """Takes updates up to a step, leaving no trace beside the state; see `heal.Replay`."""
    readings: Readings[_Label] = Readings(run.parts.device)
    quiet = replace(run, told=Silence(), readings=readings, rows=rows, blames=not known)
    state = run.state
    while state.step < until and not state.stopped_early:
        if run.stop():
            raise StopAskedError
        batch, _, attempt = _update(quiet, run.feed.at(state.step))
        label = _Label(batch.slots, state.samples, 0.0, attempt.num_micro, 0.0, 0.0, 0.0)
        verdict = _settle(quiet, label, attempt)
        if verdict is not None and not known:
            return verdict
        if isinstance(verdict, Alarm) and verdict.detector == "D6":
            run.parts.guard.reviewed.told_slow = True
        if _validation_due(quiet) and _validate(quiet) is None:
            raise StopAskedError
    verdict = _settle(quiet, None, None)
    return None if known else verdict


def _wait_for(batches: Iterator[Minibatch], stop: StopRequest) -> Minibatch:
    try:
        stop.waiting = True
        return next(batches)
    finally:
        stop.waiting = False


def _settle(run: Run, label: _Label | None, attempt: Attempt | None) -> Alarm | Stop | None:
    """Writes the rows whose numbers have arrived: with arguments those that are due, else all. The first
    verdict of the guard's review, if it has one.
    """
    state, guard, found = run.state, run.parts.guard, None
    if label is None or attempt is None:
        arrived = run.readings.rest()
    else:
        numbers = (
            attempt.loss, attempt.grad_norm, attempt.update_ratio, attempt.permitted, attempt.verdict,
            attempt.clip,
        )  # fmt: skip
        scale = () if attempt.loss_scale is None else (attempt.loss_scale,)
        arrived = run.readings.put(label, numbers + scale)
    for row, (loss, grad_norm, ratio, permitted, verdict, clip, *loss_scale) in arrived:
        slots, scale_used = row.slots, loss_scale[0] if loss_scale else 1.0
        run.told.row((
            slots.step, run.told.attempt, slots.epoch, row.samples, slots.num_samples,
            row.num_micro, int(permitted), int(verdict), row.lr, loss, grad_norm, clip, ratio, scale_used,
            row.data_wait_s, row.step_s, row.wall_s, row.wall_s * run.price_per_s, time.time(),
        ))  # fmt: skip
        run.rows.append(Row(slots.step, loss, grad_norm, bool(permitted)))
        if permitted:
            state.ledger.extend(slots.step, slots.ids)
        elif verdict != SAT_OUT:
            state.num_refused += 1
        overflow = bool(loss_scale) and math.isfinite(loss) and scale_used > LossScale.LEAST
        expected, now = overflow and verdict == NOT_FINITE, None
        if verdict != SAT_OUT and (not permitted or verdict != FINE):
            now = _refused(run, slots, loss, grad_norm, int(verdict), permitted=bool(permitted))
        judged = guard.review(
            step=slots.step, loss=loss, verdict=int(verdict), permitted=bool(permitted),
            expected=expected or now == "explained",
        )  # fmt: skip
        if isinstance(judged, Alarm) and judged.detector == "D6" and run.healer.warms_up(judged.step):
            judged = None
        if isinstance(judged, Alarm) and not guard.heals:
            _warn(run, judged)
            judged = None
        found = found or (now if isinstance(now, Stop) else None) or judged
    return found


def _refused(
    run: Run, slots: Slots, loss: float, grad_norm: float, verdict: int, *, permitted: bool
) -> Stop | Literal["explained"] | None:
    """Tells of an update that was refused, or should have been; finds the samples that are to blame.
    Explained: their data are broken, so this says nothing of the run's health.
    """
    guard = run.parts.guard
    why = _why_refused(run, loss, grad_norm, verdict)
    kind = "would_skip" if permitted else "skipped"
    run.told.event(kind, step=slots.step, reason=why, loss=loss, grad_norm=grad_norm)
    if not run.blames or not guard.heals or verdict == FINE or (verdict == NOT_FINITE and "fp16" in why):
        return None
    blamed = run.healer.blame(slots.step)
    if not blamed.ids:
        return None
    done = run.healer.quarantine(slots, blamed, lag=run.readings.lag)
    if isinstance(done, Stop):
        return done
    if done:
        number, ids = guard.history.num_decided, list(blamed.ids)
        run.told.event("quarantined", step=slots.step, ids=ids, reason=why, interventions=number)
    return "explained" if done and blamed.broken_data else None


def _warn(run: Run, alarm: Alarm) -> None:
    """Tells of an alarm that is only watched, once per stretch."""
    last = run.warned.get(alarm.detector, -_WARN_EVERY)
    if alarm.step - last >= _WARN_EVERY:
        run.warned[alarm.detector] = alarm.step
        run.told.event("alarm", step=alarm.step, detector=alarm.detector, reason=alarm.reason)


def _why_refused(run: Run, loss: float, grad_norm: float, verdict: int) -> str:
    if verdict == GRADIENT_SPIKE:
        return "gradient spike: far longer than usual"
    if verdict == LOSS_SPIKE:
        return "loss spike: far above what is usual"
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
    run.told.event("validated", step=state.step, metrics=metrics, seconds=seconds)
    if state.plateau is not None and run.schedule.plateau is not None:
        begins, piece = run.schedule.plateau
        if state.step >= begins and state.plateau.spent(metrics[piece.metric]):
            state.lr_cuts += 1
            run.told.event("rate_cut", step=state.step, metric=piece.metric, cuts=state.lr_cuts)
    if state.early_stopping is not None:
        spent = state.early_stopping.spent(metrics[run.early_stopping_metric])
        state.stopped_early = spent and state.step < run.total
    return metrics


def _finite(run: Run) -> bool:
    """Whether the weights are; if not, the events say so."""
    if run.parts.updater.finite():
        return True
    reason = "the weights are not finite: an update overflowed, or the caller changed them"
    run.record.event("diverged", step=run.state.step, reason=reason)
    return False


def _end(run: Run, **facts: Any) -> None:
    """Keeps the last state and closes the record.

    Raises:
        StateError: the disk does not take it.
    """
    state = run.state
    _settle(run, None, None)
    kept = run.keeper.finish(hurry=run.status == "preempted")
    if run.status != "diverged" and not _finite(run):
        run.status = "diverged"
    reason = run.stop.reason or run.stop.budget
    if reason and not facts:
        facts = {"reason": reason}
    newest = run.keeper.newest
    if not kept and (run.status != "preempted" or newest is None):
        run.status = "failed"
        facts = {"error": "the last state could not be written"}
    run.record.event(
        "ended",
        status=run.status,
        step=state.step,
        samples=state.samples,
        seconds=round(state.elapsed_s, 3),
        **facts,
    )
    if kept:
        if run.status in ("finished", "stopped_early"):
            run.keeper.ballast.unlink(missing_ok=True)
        run.record.close()
        return
    run.record.abandon()  # the disk may hang
    if run.status == "failed":
        raise StateError(
            f"{run.record.folder.path}: the state after step {state.step:,} could not be written.",
            why="The disk did not take it; see checkpoint_failed in events.jsonl. The newest good state is "
            + ("none." if newest is None else f"that after step {newest.step:,}."),
            fix="Make room, or mend the disk, and run the same command again.",
        )


def _fail(run: Run, error: BaseException) -> None:
    """Notes an error. The state is not kept: it may be half-way through a step."""
    run.status = "preempted" if isinstance(error, KeyboardInterrupt) else "failed"
    what = f"{type(error).__name__}: {error}"
    if run.record.closed:
        return
    if run.record.lock.lost:  # the directory is another's
        run.keeper.writer.drain(_LEAVE_S)
        return
    run.keeper.writer.drain(run.keeper.deadline_s)
    run.keeper.look()
    run.record.event(
        "ended", status=run.status, step=run.state.step, error=what, failure=failure_class(error)
    )
    with suppress(OSError):
        run.record.close()


def _give_up(run: Run) -> None:
    """Ends the process, from another thread: asked to stop, it did not come to a step's end in time."""
    newest = run.keeper.newest

    def note() -> None:
        why = f"{run.stop.reason}; no step ended within checkpoint.grace = {run.stop.grace_s:g} s"
        run.record.event("ended", status="preempted", step=run.state.step, reason=why)

    noting = threading.Thread(target=note, daemon=True)  # the disk may be what hangs
    noting.start()
    noting.join(1.0)
    os._exit(1 if newest is None else 75)


def _watched(run: Run) -> HangWatch:
    """Watches whether steps, or batches of a validation, go on."""

    def notice(seconds: float, file: Path) -> None:
        where = str(file.relative_to(run.record.folder.path))
        run.record.event("hang", step=run.state.step, seconds=round(seconds, 1), stacks=where)

    return HangWatch(
        run.record.folder.incidents,
        after_s=run.hang_after_s,
        progress=lambda: (run.state.step, run.stop.num_asked),
        notice=notice,
    )
