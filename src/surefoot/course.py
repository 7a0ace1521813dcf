"""The course of a run: updates, the rows they leave, and validations. It knows no run directory.

Read after `train`, which leads a run along it and keeps its states; `replay` takes steps of it again.
"""

from __future__ import annotations

import math
import random
import time
import traceback
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from surefoot.blame import Blame, usual_loss
from surefoot.captured import Captured, UncapturedError
from surefoot.compiled import ChangedError
from surefoot.data.feed import Feed
from surefoot.data.holes import leave_out
from surefoot.data.plan import Cadence
from surefoot.errors import RecipeError
from surefoot.graph import Graph
from surefoot.guard.detect import (
    FINE,
    GRADIENT_SPIKE,
    LOSS_SPIKE,
    MOST_GROWTH,
    NOT_FINITE,
    SAT_OUT,
    STATISTICS_SPIKE,
)
from surefoot.guard.layers import Layer, layers_of
from surefoot.guard.review import Alarm
from surefoot.guard.stop import Stop
from surefoot.heal import EVERY, Healer, Row, StopAskedError, same_row
from surefoot.measure.evaluate import Evaluation
from surefoot.measure.profile import phase
from surefoot.measure.readings import Readings, RowNumbers
from surefoot.optim.precision import LossScale
from surefoot.optim.schedules import Resolved
from surefoot.state import RunState
from surefoot.stopping import StopRequest
from surefoot.train_step import Attempt, Parts, train_step
from surefoot.types import Minibatch, Slots

_WARN_EVERY = 1000
_REST = float(FINE), 1.0, 1.0
"""Verdict, clip and loss scale, as far as the numbers of a step that was found fine lack them."""


class Record(Protocol):
    """Who is told what happens: a `Recorder`, or one that keeps nothing.

    attempt: number of this process life of the run.
    """

    attempt: int

    def row(self, values: Sequence[int | float]) -> None:
        """One value per column of the step log."""
        ...

    def event(self, kind: str, **facts: Any) -> Path | None:
        """A rare fact; the folder of the bundle that it leaves, if it does."""
        ...


class Silence:
    """Keeps nothing: of updates that are taken again."""

    attempt = 0

    def row(self, values: Sequence[int | float]) -> None:
        """Forgotten."""

    def event(self, kind: str, **facts: Any) -> None:
        """Forgotten."""


class Label(NamedTuple):
    """What the host knows of a row before its numbers arrive."""

    slots: Slots
    samples: int
    lr: float
    num_micro: int
    data_wait_s: float
    step_s: float
    wall_s: float


class Taken(NamedTuple):
    """A step that was found fine, to be settled. samples: consumed by then. multiplier: of the base rates.
    numbers: of an `Attempt`; of a step that a graph took as a calm one the first four. ended: by
    `time.perf_counter`.
    """

    slots: Slots
    samples: int
    multiplier: float
    num_micro: int
    data_wait_s: float
    numbers: Sequence[float]
    ended: float


@dataclass(kw_only=True)
class Course:
    """What updates are made of, what they change, and who is told.

    total: updates in the whole run. validate: when, besides at its end. rows: the newest, for the guard.
    blames: samples that break a step are looked for. alone: no code of the caller runs between steps.
    before: rows of an earlier attempt, and their numbers of passes, for steps that are taken again now:
    they must come out alike. price_per_s: of a second of this machine, or 0. has_learned: an update before
    the next was applied, as far as has been looked. draws_nothing: no pass draws random numbers; None: that
    has not been looked at since code of the caller's ran.
    """

    parts: Parts
    state: RunState
    feed: Feed
    schedule: Resolved
    total: int
    healer: Healer
    told: Record
    evaluation: Evaluation | None
    validate: Cadence | None
    early_stopping_metric: str
    readings: Readings[Label]
    rows: MutableSequence[Row]
    price_per_s: float = 0.0
    stop: StopRequest = field(default_factory=StopRequest)
    blames: bool = True
    alone: bool = True
    graph: Graph | Captured | None = None
    before: dict[int, tuple[Row, int]] = field(default_factory=dict)
    has_learned: bool = False
    draws_nothing: bool | None = None
    warned: dict[str, int] = field(default_factory=dict)


def update(
    course: Course, batch: Minibatch, multiplier: float | None = None
) -> tuple[Minibatch, float, Attempt]:
    """One update: the batch without what is in quarantine, the schedule's multiplier, if it is not given,
    what came of it.
    """
    state, attempt = course.state, None
    batch = without_quarantined(course, batch)
    if multiplier is None:
        (multiplier,) = multipliers(course, 1)
    if course.parts.guard.heals and _nothing_is_known(course) and course.blames:
        batch = _without_unlike(course, batch)
    if course.graph is not None and state.eager_from is None:
        try:
            with phase("compiled step"):
                attempt = course.graph(batch, multiplier, check=not course.alone)
        except UncapturedError as error:
            course.told.event("uncompiled", step=state.step, reason=str(error))
        except ChangedError:
            state.eager_from = state.step
            course.told.event("uncompiled", step=state.step)
    if attempt is None:
        each: list[Tensor] | None = [] if state.step == 0 and course.parts.guard.on else None
        attempt = train_step(course.parts, batch, multiplier, each=each)
        if each:
            course.parts.guard.reviewed.untrained = usual_loss(batch, torch.cat(each))
    state.step += 1
    state.samples += batch.slots.num_samples
    return batch, multiplier, attempt


def _nothing_is_known(course: Course) -> bool:
    """Whether there are batch norms, and no update has been applied yet; or it is the first step."""
    step, buffers = course.state.step, course.parts.buffers
    if not buffers.statistics or (step and course.has_learned):
        return False
    course.has_learned = step > 0 and buffers.have_seen()
    return not course.has_learned


def _without_unlike(course: Course, batch: Minibatch) -> Minibatch:
    """The batch without samples that are far from the others."""
    blamed = course.healer.quarantine_at_once(batch)
    if not blamed.ids:
        return batch
    step, number = batch.slots.step, course.parts.guard.history.num_decided
    why = (
        f"first batch: the running statistics of batch norm {blamed.layer!r} would have begun "
        f"{blamed.growth:.3g} times as large as without them"
    )
    ids = list(blamed.ids)
    course.told.event("quarantined", step=step, ids=ids, reason=why, at_once=True, interventions=number)
    return without_quarantined(course, batch)


def without_quarantined(course: Course, batch: Minibatch) -> Minibatch:
    """The batch without what is in quarantine in its step."""
    holes = course.parts.guard.history.holes(batch.slots.step, batch.slots.ids)
    return batch if holes is None else leave_out(batch, holes)


def multipliers(course: Course, num: int, *, after: int = 0) -> list[float]:
    """What the base rates are multiplied by in the next steps, after that many more: up to one for which
    the schedule fails, unless that is the next.
    """
    schedule, state, history = course.schedule, course.state, course.parts.guard.history
    found: list[float] = []
    begins = state.step + after
    for step in range(begins, begins + num):
        try:
            found.append(history.multiplier(step, schedule(step, cuts=state.lr_cuts)))
        except Exception:  # of a caller's piece: the steps before it come first
            if step == state.step:
                raise
            break
    return found


def replay(
    course: Course, until: int, rows: list[Row], *, known: bool, told: Record | None = None
) -> Alarm | Stop | None:
    """Takes updates up to a step, leaving no trace beside the state, and in `told`; see `heal.Replay`."""
    readings: Readings[Label] = Readings(course.parts.device)
    quiet = replace(
        course, told=told or Silence(), readings=readings, rows=rows, blames=not known, before={}
    )
    state = course.state

    def news(verdict: Alarm | Stop | None) -> Alarm | Stop | None:
        """The verdict, unless it was answered before."""
        if known and isinstance(verdict, Alarm) and verdict.detector == "D6":
            course.parts.guard.reviewed.told_slow = True
        return None if known else verdict

    while state.step < until and not state.stopped_early:
        if course.stop():
            raise StopAskedError
        batch, multiplier, attempt = update(quiet, course.feed.at(state.step))
        lr = course.parts.base_lr[0] * multiplier
        label = Label(batch.slots, state.samples, lr, attempt.num_micro, 0.0, 0.0, 0.0)
        verdict = settle(quiet, label, attempt.numbers())
        if news(verdict) is not None:
            return verdict
        if verdict is None and state.step % EVERY == 0 and course.parts.guard.on:
            look_at_layers(quiet, layers_of(course.parts.model, attempt.trained), attempt.norms)
        if validation_due(quiet) and run_validation(quiet) is None:
            raise StopAskedError
    return news(settle(quiet, None, None))


def settle(course: Course, label: Label | None, numbers: RowNumbers | None) -> Alarm | Stop | None:
    """Writes the rows whose numbers have arrived: with arguments those that are due, else all. The first
    verdict of the guard's review, if it has one. numbers: of an `Attempt`.
    """
    state, guard, found = course.state, course.parts.guard, None
    if label is None or numbers is None:
        arrived = course.readings.rest()
    else:
        arrived = course.readings.put(label, numbers)
    for row, read in arrived:
        loss, grad_norm, _, permitted, verdict, _, *loss_scale = read
        slots, scale_used = row.slots, loss_scale[0] if loss_scale else 1.0
        taken = _note(course, row, (*read[:6], scale_used), time.time())
        if not permitted and verdict != SAT_OUT:
            state.num_refused += 1
        overflow = bool(loss_scale) and math.isfinite(loss) and scale_used > LossScale.LEAST
        expected, now = overflow and verdict == NOT_FINITE, None
        if verdict != SAT_OUT and (not permitted or verdict != FINE):
            now = _refused(course, slots, loss, grad_norm, int(verdict), permitted=bool(permitted))
        judged = guard.review(
            step=slots.step, loss=loss, verdict=int(verdict), permitted=bool(permitted),
            expected=expected or now == "explained",
        )  # fmt: skip
        canary = _canary(course, taken, row.num_micro)
        if not isinstance(judged, Stop):
            judged = heeded(course, judged) or heeded(course, canary)
        found = found or (now if isinstance(now, Stop) else None) or judged
    return found


def settle_calm(course: Course, taken: Sequence[Taken], *, begun: float, row_before: float) -> None:
    """Writes the rows of steps that were found fine, and that the guard has taken up. begun: when the first
    of them did, by `time.perf_counter`; row_before: the same of the row before it.
    """
    offset, base_lr = time.time() - time.perf_counter(), course.parts.base_lr[0]
    course.state.elapsed_s += taken[-1].ended - begun
    for slots, samples, multiplier, num_micro, waited_s, numbers, ended in taken:
        times = waited_s, ended - begun, ended - row_before
        label = Label(slots, samples, base_lr * multiplier, num_micro, *times)
        _note(course, label, (*numbers, *_REST[len(numbers) - 4 :]), offset + ended)
        begun = row_before = ended


def heeded(course: Course, alarm: Alarm | None) -> Alarm | None:
    """The alarm, if something is to be done about it; one that is only watched is told of."""
    if alarm is None or (alarm.detector == "D6" and course.healer.warms_up(alarm.step)):
        return None
    if course.parts.guard.heals:
        return course.healer.reconsidered(alarm) if alarm.detector == "D6" else alarm
    _warn(course, alarm)
    return None


def _note(course: Course, label: Label, numbers: Sequence[float], now: float) -> Row:
    """Writes a row, and extends the ledger. numbers: as `settle` has them, the loss scale always."""
    slots = label.slots
    loss, grad_norm, ratio, permitted, verdict, clip, loss_scale = numbers
    course.told.row((
        slots.step, course.told.attempt, slots.epoch, label.samples, slots.num_samples, label.num_micro,
        int(permitted), int(verdict), label.lr, loss, grad_norm, clip, ratio, loss_scale,
        label.data_wait_s, label.step_s, label.wall_s, label.wall_s * course.price_per_s, now,
    ))  # fmt: skip
    row = Row(slots.step, loss, grad_norm, bool(permitted), ratio, verdict)
    course.rows.append(row)
    if permitted:
        course.state.ledger.extend(slots.step, slots.ids)
    return row


def _refused(
    course: Course, slots: Slots, loss: float, grad_norm: float, verdict: int, *, permitted: bool
) -> Stop | Literal["explained"] | None:
    """Tells of an update that was refused, or should have been; finds the samples that are to blame.
    Explained: by them, or by what was decided before, so this says nothing of the run's health.
    """
    guard, spike = course.parts.guard, verdict == STATISTICS_SPIKE
    if spike and guard.heals and not course.blames:
        return _as_before(course, slots.step)
    why = _why_refused(course, loss, grad_norm, verdict)
    blames = course.blames and guard.heals and verdict != FINE
    late = spike and guard.history.will_let_grow(slots.step)
    blamed = Blame(())
    if blames and not late and not (verdict == NOT_FINITE and "fp16" in why):
        blamed = course.healer.blame(slots.step, verdict)
    grown = {}
    if spike:
        why = _what_would_grow(blamed)
        grown = {"growth": blamed.growth} if blamed.layer else {}
    kind = "would_skip" if permitted else "skipped"
    course.told.event(kind, step=slots.step, reason=why, loss=loss, grad_norm=grad_norm, **grown)
    if late:
        return "explained"
    if blamed.layer and not blamed.ids:
        _let_grow(course, slots, at_once=blamed.by_nature)
    if not blamed.ids:
        return None
    done = course.healer.quarantine(slots, blamed, lag=course.readings.lag)
    if isinstance(done, Stop):
        return done
    if done:
        number, ids = guard.history.num_decided, list(blamed.ids)
        course.told.event("quarantined", step=slots.step, ids=ids, reason=why, interventions=number)
    elif spike:  # there are too many
        _let_grow(course, slots, at_once=False)
    return "explained" if done and (blamed.broken_data or spike) else None


def _as_before(course: Course, step: int) -> Literal["explained"] | None:
    """What came of a step that was refused for running statistics when it was taken for the first time."""
    guard = course.parts.guard
    if guard.history.blamed(step) or guard.history.will_let_grow(step):
        return "explained"
    guard.unexplained.append(step)
    return None


def _let_grow(course: Course, slots: Slots, *, at_once: bool) -> None:
    """Takes running statistics as they come from a step on, and tells of it, if it comes to that."""
    lag = course.readings.lag
    until = course.healer.let_grow(slots.step, at_once=at_once, lag=lag)
    if until is None:
        return
    why = (
        "without the samples that make them grow the layer's input does not vary: it is there for them"
        if at_once
        else "no few samples are to blame: the data, or the model, changed"
    )
    course.told.event(
        "borne",
        step=slots.step + 1 + lag,
        detector="statistics spike",
        reason=f"{why}. Until step {until} running statistics are taken as they come",
        interventions=course.parts.guard.history.num_decided,
    )


def _canary(course: Course, taken: Row, num_micro: int) -> Alarm | None:
    """D7: a step that an earlier attempt took from the same state came out otherwise."""
    if not course.before:
        return None
    then, passes = course.before.pop(taken.step, (taken, num_micro))
    if not course.parts.guard.on or passes != num_micro or same_row(then, taken, exact=True):
        return None
    course.before.clear()
    reason = (
        f"step {taken.step} came out otherwise than before the run was continued: "
        f"loss {taken.loss:.9g}, was {then.loss:.9g}"
    )
    return Alarm("D7", taken.step, taken.step, reason)


def look_at_layers(course: Course, layers: Sequence[Layer], norms: Tensor) -> None:
    """Tells of layers whose gradient, in the update just taken, vanishes or explodes. norms: of the
    gradients of all that is trained, 1-d.
    """
    each = norms.tolist()
    rms = [each[i] / math.sqrt(size) for _, i, size in layers]
    for sick in course.parts.guard.layers.look([name for name, _, _ in layers], rms):
        course.told.event("layer", step=course.state.step, **sick._asdict())


def _warn(course: Course, alarm: Alarm) -> None:
    """Tells of an alarm that is only watched, once per stretch."""
    last = course.warned.get(alarm.detector, -_WARN_EVERY)
    if alarm.step - last >= _WARN_EVERY:
        course.warned[alarm.detector] = alarm.step
        seen = {"step": alarm.step, "detector": alarm.detector, "reason": alarm.reason}
        course.told.event("alarm", **seen, untried="the guard only watches")


def _what_would_grow(blamed: Blame) -> str:
    whose = f"batch norm {blamed.layer!r}" if blamed.layer else "a batch norm"
    if not math.isfinite(blamed.growth):
        return f"statistics spike: the running statistics of {whose} would no longer have been finite"
    told = f"statistics spike: the running statistics of {whose} would have become more than"
    return f"{told} {MOST_GROWTH:g} times as large" + ("" if blamed.layer else ", or not finite")


def _why_refused(course: Course, loss: float, grad_norm: float, verdict: int) -> str:
    if verdict == GRADIENT_SPIKE:
        return "gradient spike: far longer than usual"
    if verdict == LOSS_SPIKE:
        return "loss spike: far above what is usual"
    if not math.isfinite(loss):
        return "loss is not finite"
    if math.isfinite(grad_norm):
        return "the optimizer's update is not finite"
    fp16 = course.parts.precision.scale is not None
    return "fp16 overflow: loss scale halved" if fp16 else "gradient is not finite"


def validation_due(course: Course) -> bool:
    """Whether the last attempt ended between an update and the validation that follows it."""
    step = course.state.step
    if course.evaluation is None or step == 0 or course.state.validated_at == step:
        return False
    return step == course.total or (course.validate is not None and course.validate.after(step - 1) == step)


def run_validation(course: Course) -> dict[str, float] | None:
    """Evaluates the model; what follows from it for the rate and for stopping early goes into the
    state. None if there is nothing to validate on, or if a stop was asked for meanwhile.
    """
    state = course.state
    if course.evaluation is None:
        return None
    begun = time.perf_counter()
    with phase("validation"):
        metrics = course.evaluation(course.parts.model, stop=course.stop)
    course.draws_nothing = None
    if course.graph is not None:
        course.graph.suspects = True
    if metrics is None:
        return None
    state.metrics, state.validated_at = metrics, state.step
    seconds = round(time.perf_counter() - begun, 6)
    course.told.event("validated", step=state.step, metrics=metrics, seconds=seconds)
    if state.plateau is not None and course.schedule.plateau is not None:
        begins, piece = course.schedule.plateau
        if state.step >= begins and state.plateau.spent(metrics[piece.metric]):
            state.lr_cuts += 1
            course.told.event("rate_cut", step=state.step, metric=piece.metric, cuts=state.lr_cuts)
    if state.early_stopping is not None:
        spent = state.early_stopping.spent(metrics[course.early_stopping_metric])
        state.stopped_early = spent and state.step < course.total
    return metrics


@contextmanager
def callers_generators() -> Iterator[None]:
    """Puts the caller's random generators back at the end: updates seed them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


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
