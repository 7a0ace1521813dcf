"""The loop: from the first step that is not done yet to the end of the run.

Read this first, then `course`, then `train_step`. A batch comes from the feed, an update is attempted, its
row goes to the record, and every so often the model is validated and the state kept.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surefoot.calm import NOTHING, steps_ahead
from surefoot.checkpoint.tensors import safetensors_chunks
from surefoot.clock import Batches, Clock, next_batch
from surefoot.course import (
    Course,
    callers_generators,
    first_failure,
    look_at_layers,
    replay,
    run_validation,
    settle,
    update,
    validation_due,
)
from surefoot.errors import StateError, SurefootError, failure_class
from surefoot.graph import Graph
from surefoot.guard.hang import HangWatch
from surefoot.guard.layers import layers_of
from surefoot.guard.review import Alarm
from surefoot.guard.stop import Stop
from surefoot.heal import EVERY, SELDOM, LetBe, Row, StopAskedError
from surefoot.keep import Keeper
from surefoot.measure.profile import Profile, phase
from surefoot.parallel.device import set_threads
from surefoot.record.recorder import Recorder
from surefoot.stopping import Budget, NoLongerWaiting, signals_ask
from surefoot.types import Outcome, leaves

_LEAVE_S = 10.0
"""How long a process that has lost the run waits for its writer to notice."""


@dataclass(kw_only=True)
class Run(Course):
    """A run, ready to go on: what `build` joins from a recipe and operations.

    fresh: nothing of it was kept before. hang_after_s: without a step or a batch of validation, after
    which the threads' stacks are written down. threads: for torch's kernels while it takes steps;
    callers_threads: between them. keeps_samples: the batch in which an incident began goes into its bundle.
    profile: of its first steps.
    """

    keeper: Keeper
    record: Recorder
    budget: Budget
    hang_after_s: float
    threads: int
    callers_threads: int = 0
    fresh: bool
    keeps_samples: bool = False
    profile: Profile | None = None
    status: str = "running"

    def undisturbed(self, until: int) -> int:
        """How many steps nothing is due after, before the one that ends at `until`; none unless their
        batches are at hand, since rows wait meanwhile, and none under a profiler or on a GPU, whose
        numbers arrive later.
        """
        step = self.state.step
        seen = self.profile is not None or torch._C._autograd._profiler_enabled()
        if not self.alone or seen or self.before or self.readings.lag or not self.feed.at_hand:
            return 0
        kept, limit = self.keeper.due_step or self.total, self.budget.updates or self.total
        remembered = (step // self.remembers_every + 1) * self.remembers_every
        return min(until, kept, limit, self.total, remembered) - 1 - step

    @property
    def remembers_every(self) -> int:
        """Steps between the states that are kept in memory."""
        short = isinstance(self.graph, Graph) and self.state.eager_from is None
        return SELDOM if self.alone and short else EVERY


def steps(run: Run) -> Generator[Outcome, None, None]:
    """Attempts updates until the run ends; `run.status` then says how.

    Every way out of the loop leaves the directory in order: a request to stop, or a caller that stops
    iterating, keeps the state; an error leaves the last checkpoint as it is.
    """
    run.stop.grace_s, run.stop.give_up = run.keeper.deadline_s, lambda: _give_up(run)
    run.callers_threads = torch.get_num_threads()
    try:
        set_threads(run.threads)
        with callers_generators(), signals_ask(run.stop), _watched(run):
            run.status = yield from _attempt(run)
            _end(run)
    except GeneratorExit:
        run.status = "diverged" if run.state.diverged else "preempted"
        _end(run, reason="the caller left the loop")
        raise
    except Exception as error:
        if not (run.fresh and run.state.step == run.record.num_rows == 0):  # it may have gone back there
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
        set_threads(run.callers_threads)
        run.keeper.writer.close()


def _told(run: Run, outcome: Outcome) -> Generator[Outcome, None, None]:
    """Hands an outcome out. The body, and another run whose steps are taken in turns with these, has a
    number of threads of its own.
    """
    set_threads(run.callers_threads)
    try:
        yield outcome
    finally:
        run.callers_threads = torch.get_num_threads()
        set_threads(run.threads)


def _attempt(run: Run) -> Generator[Outcome, None, str]:
    """Updates from `state.step` on; returns the status that the run ends with."""
    guard, clock = run.parts.guard, Clock()
    if run.state.diverged:  # a kill came between its last checkpoint and the event that ends it
        return "diverged"
    while True:
        if guard.pending is not None and _is_due(run, guard.pending):
            status = _heal(run, guard.pending)
            if status:
                return status
        if validation_due(run) and run_validation(run) is None:
            return "preempted"
        with closing(run.feed.batches(run.state.step, run.total)) as batches:  # else workers outlive errors
            status = yield from _updates(run, Batches(batches), clock)
        if status:
            return status


def _updates(run: Run, batches: Batches, clock: Clock) -> Generator[Outcome, None, str]:
    """Updates until the run ends, or, with an empty status, until the guard's alarm."""
    state, parts, record = run.state, run.parts, run.record
    next_validation = run.validate.after(state.step) if run.validate else run.total + 1
    keeper, clock.boundary = run.keeper, time.perf_counter()
    while state.step < run.total and not state.stopped_early:
        if parts.strategy.agree(run.stop()):
            return "preempted"
        wall_s = time.perf_counter() - clock.begun
        run.stop.budget = run.budget.reached(state.step, wall_s=wall_s, cost=wall_s * run.price_per_s)
        if run.stop.budget:
            return "budget"
        if record.lock.lost:
            record.lock.check()
        if run.profile is not None:
            _tell_profile(run, run.profile.before(state.step))
        ahead = NOTHING
        if clock.boundary < clock.ahead_until and (most := run.undisturbed(next_validation)) > 0:
            ahead = steps_ahead(run, batches, clock, most=most)
        if ahead.alarm is not None:
            parts.guard.pending = ahead.alarm
            return ""
        if ahead.num and not ahead.unusual and ahead.attempted is None:
            continue
        try:
            attempted = ahead.attempted or update(run, next_batch(batches, run.stop, clock))
        except NoLongerWaiting:
            return "preempted"
        batch, multiplier, attempt = attempted
        slots = batch.slots
        label = clock.label(run, slots, multiplier, attempt.num_micro)
        clock.ordinary_step_ended(label.step_s)
        with phase("row"):
            verdict = settle(run, label, attempt.numbers())
        ratio = torch.as_tensor(attempt.update_ratio, dtype=attempt.grad_norm.dtype, device=parts.device)
        outcome = Outcome(
            slots.step, slots.epoch, state.samples, label.lr, attempt.loss, attempt.grad_norm, ratio,
            attempt.permitted, parts.model, batch,
        )  # fmt: skip
        if verdict is not None or parts.guard.pending is not None:
            status = _noted(run, verdict)
            if status is not None:
                yield from _told(run, outcome)
                return status
        if state.step >= next_validation or state.step == run.total:
            next_validation = run.validate.after(state.step) if run.validate else run.total + 1
            outcome = outcome._replace(metrics=run_validation(run))
            clock.boundary = time.perf_counter()
        yield from _told(run, outcome)
        if validation_due(run):
            return "preempted"  # a stop was asked for while validating
        if state.step % EVERY == 0 and parts.guard.on:
            look_at_layers(run, layers_of(parts.model, attempt.trained), attempt.norms)
            if parts.guard.heals:
                verdict = _verdict_so_far(run)
                if verdict is None and state.step % run.remembers_every == 0:
                    run.healer.remember()
            clock.boundary = time.perf_counter()
        keeper.look()
        if keeper.poisoned and parts.guard.heals:
            keeper.poisoned = False
            verdict = verdict or run.healer.unsound()
        keeps = keeper.due()
        if keeps:
            arrived = settle(run, None, None)
            verdict = verdict or arrived
        if verdict is not None:
            status = _noted(run, verdict)
            if status is not None:
                return status
        if keeps:
            with phase("checkpoint"):
                keeper.keep()
            clock.boundary = time.perf_counter()
    status = _noted(run, _verdict_so_far(run, ends=True))
    if status is not None:
        return status
    return "stopped_early" if state.stopped_early else "finished"


def _verdict_so_far(run: Run, *, ends: bool = False) -> Alarm | Stop | None:
    """On all steps that were taken, and on the state after them."""
    verdict = settle(run, None, None) or run.parts.guard.pending
    if verdict is not None or not run.parts.guard.heals:
        return verdict
    return run.healer.last_look() if ends else run.healer.look()


def _noted(run: Run, verdict: Alarm | Stop | None) -> str | None:
    """Takes note of a verdict. The status, if no step may be taken now: empty if an alarm comes first."""
    guard = run.parts.guard
    if isinstance(verdict, Stop):
        run.state.diverged = True
        run.record.event("diverged", step=run.state.step, reason=verdict.reason, fix=verdict.fix)
        return "diverged"
    guard.pending = guard.pending or verdict
    if guard.pending is None or not _is_due(run, guard.pending):
        return None
    settle(run, None, None)
    return ""


def _is_due(run: Run, alarm: Alarm) -> bool:
    """Whether it is seen to now: when its row would have arrived in a run that nothing disturbs. A
    checkpoint, or a stop, waits for all rows, and may bring an alarm earlier.
    """
    state = run.state
    ends = state.step >= run.total or state.stopped_early
    return alarm.detector == "D0" or ends or state.step > alarm.step + run.readings.lag


def _tell_profile(run: Run, facts: dict[str, Any] | None) -> None:
    if facts is not None:
        run.profile = None
        kind = "profiled" if "file" in facts else "not_profiled"
        run.record.event(kind, step=run.state.step, **facts)


def _heal(run: Run, alarm: Alarm) -> str:
    """Goes back to a healthy state and on from there; the status, if the run ends now."""
    guard = run.parts.guard
    run.keeper.settle()
    seen = {"step": alarm.step + 1, "detector": alarm.detector, "reason": alarm.reason}
    whole, rollbacks = run.state.snapshot().copy(), guard.history.count("rollback")
    given_up = run.state.ledger
    left = min(run.state.step, alarm.step + 1)  # a device tells later; D0 is told of all its 200 steps

    def again(until: int, rows: list[Row] | None = None, *, known: bool = False) -> Alarm | Stop | None:
        return replay(run, until, [] if rows is None else rows, known=known)

    try:
        done = run.healer.heal(alarm, again, lambda: run.told.event("healing", **seen))
    except StopAskedError:
        run.state.restore(whole)  # with the alarm still pending
        return "preempted"
    if isinstance(done, LetBe):
        run.state.restore(whole)
        guard.pending = None
        guard.reviewed.told_slow |= alarm.detector == "D6"
        why = {"untried": done.untried} if done.untried else {"tried": list(done.tried)}
        run.told.event("alarm", **seen | {"reason": done.reason}, **why)
        return ""
    guard.pending = None
    went_back: dict[str, Any] = {}
    if guard.history.count("rollback") > rollbacks:
        now = run.state.ledger.value
        run.state.ledger = given_up.back_to(run.state.step, now, left=left)
        went_back = {"left": left, "ledger": now, "given_up": given_up.value, "rows": run.record.num_rows}
    if isinstance(done, Stop):
        run.state.diverged = True
        why = {"reason": done.reason, "fix": done.fix}
        bundle = run.told.event("diverged", step=run.state.step, **why, **went_back)
        _keep_samples(run, bundle, alarm.onset)
        return "diverged"
    if "at" not in done:  # the run goes on from where it is
        run.told.event("borne", **done, interventions=guard.history.num_decided)
        return ""
    done |= went_back | {"interventions": guard.history.num_decided}
    bundle = run.told.event("rolled_back", **done)
    _keep_samples(run, bundle, alarm.onset)
    run.keeper.went_back()
    return ""


def _keep_samples(run: Run, bundle: Path | None, step: int) -> None:
    """Puts the batch of a step into a bundle, if operations ask for that."""
    if bundle is None or not run.keeps_samples:
        return
    batch = run.feed.at(step)
    tensors = {
        f"data.{i}": leaf for i, leaf in enumerate(leaves(batch.data)) if isinstance(leaf, torch.Tensor)
    }
    tensors["ids"] = torch.from_numpy(batch.slots.ids)
    with suppress(OSError), (bundle / "samples.safetensors").open("wb") as file:
        file.writelines(safetensors_chunks(tensors))


def _finite(run: Run) -> bool:
    """Whether the weights are, and at the end of the run what the optimizer keeps for them; if not, the
    events say so. Not asked of a run that heals, and is to go on: it does when it goes on.
    """
    reason, ends = "", run.status in ("finished", "stopped_early")
    if run.parts.guard.heals and not ends:
        return True
    if not run.parts.updater.weights_are_finite():
        reason = "the weights are not finite: an update overflowed, or the caller changed them"
    elif run.keeper.poisoned and ends:
        reason = "what the optimizer keeps for the weights is not finite: no update can be applied any more"
    if reason:
        run.record.event("diverged", step=run.state.step, reason=reason)
    return not reason


def _end(run: Run, **facts: Any) -> None:
    """Keeps the last state and closes the record.

    Raises:
        StateError: the disk does not take it.
    """
    state, verdict = run.state, settle(run, None, None)
    if run.status != "diverged" and _noted(run, verdict) == "diverged":
        run.status = "diverged"
    if run.profile is not None:
        _tell_profile(run, run.profile.end(state.step))
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
            run.keeper.ballast.drop()
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
    try:
        run.keeper.writer.drain(run.keeper.deadline_s)
        run.keeper.look()
        run.record.event(
            "ended", status=run.status, step=run.state.step, error=what, failure=failure_class(error)
        )
    finally:
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
