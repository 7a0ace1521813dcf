"""Joining a recipe with operations into a run.

`prepare` checks everything that can be checked before the first file is written. Then the run directory is
opened: a new run is begun, an interrupted one continued from its newest sound checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from surefoot.checkpoint.ballast import Ballast
from surefoot.checkpoint.retention import Retention
from surefoot.checkpoint.writer import Writer
from surefoot.choice import Choice, Kept, kept_choice
from surefoot.environment import of_attempt
from surefoot.errors import SurefootError
from surefoot.guard.detect import NOT_FINITE
from surefoot.guard.hang import stacks_if_stuck
from surefoot.heal import REMEMBERED, Row
from surefoot.keep import Keeper
from surefoot.measure.profile import Profile
from surefoot.operations import Operations, seconds
from surefoot.parallel.device import set_threads
from surefoot.prepare import check_kinds, prepare
from surefoot.protocols import KeyedSource
from surefoot.recipe import Recipe
from surefoot.record.columns import Columns, lineage
from surefoot.record.events import read_events
from surefoot.record.folder import RunFolder
from surefoot.record.rows import read_log
from surefoot.resume import begin_or_continue
from surefoot.state import RunState
from surefoot.stopping import Budget
from surefoot.train import Run


@dataclass
class Build:
    """A run made ready.

    run: to be handed to `train.steps`; None if the run has ended already. notes: lines for people.
    groups: the table of parameter groups.
    """

    folder: RunFolder
    state: RunState
    run: Run | None
    ended: str
    notes: list[str] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)


def build(
    recipe: Recipe,
    folder: RunFolder,
    operations: Operations,
    *,
    origin: Mapping[str, Any] | None = None,
    fresh: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> Build:
    """Makes a run of `recipe` ready in `folder`.

    Args:
        origin: what is to be recorded of where the recipe came from: ``file`` and ``options``.
        fresh: a run that lies in `folder` is moved aside, once everything else is in order.
        say: is told of what takes a while, before it does.

    Raises:
        UsageError: recipe, operations or folder do not fit; nothing was changed.
        StateError: the run has checkpoints, but none is sound.
    """
    check_kinds(recipe, operations)
    threads = torch.get_num_threads()
    try:
        with stacks_if_stuck(seconds(operations.hang_after, name="hang_after")):
            return _build(recipe, folder, operations, origin, fresh, say)
    finally:
        set_threads(threads)


def _build(
    recipe: Recipe,
    folder: RunFolder,
    operations: Operations,
    origin: Mapping[str, Any] | None,
    fresh: bool,
    say: Callable[[str], object],
) -> Build:
    made = prepare(recipe, operations, origin, kept=None if fresh else _kept_choice(folder), say=say)
    state, groups = made.state, made.groups
    if fresh:
        folder.move_aside()
    opened = begin_or_continue(folder, made.identity, state, _retention(operations))
    record, ended, notes = opened.record, opened.ended, opened.notes
    notes += _notes(recipe, operations, made.choice)
    if record is None:
        return Build(folder, state, None, ended, notes, groups)
    keeper = Keeper(
        state=state,
        record=record,
        writer=Writer(opened.store, before=record.make_durable),
        store=opened.store,
        every=made.keep_every,
        total=made.total,
        deadline_s=seconds(operations.checkpoint.grace, name="checkpoint.grace"),
        ballast=Ballast(folder.ballast, record.lock.check),
        newest=opened.checkpoint,
    )
    keeper.ballast.prepare(state.num_bytes())
    notes += made.doubts()
    course = made.course(made.feed(record.event), opened.store, record, _rows(folder, state))
    if not opened.environment_changed:
        course.before = _to_be_repeated(folder, state)
    run = Run(
        **vars(course),
        keeper=keeper,
        record=record,
        budget=_budget(operations, folder),
        hang_after_s=seconds(operations.hang_after, name="hang_after"),
        threads=torch.get_num_threads(),
        fresh=record.attempt == 1,
        keeps_samples=operations.incidents.samples,
        profile=Profile(folder.profiles, operations.profile) if operations.profile else None,
    )
    return Build(folder, state, run, ended, notes, groups)


def _kept_choice(folder: RunFolder) -> Kept | None:
    """How the run was computed that lies in a folder, if one does and tells."""
    if not folder.holds_run():
        return None
    try:
        begun = folder.identity()["environment"]
    except SurefootError:  # to be looked into later
        return None
    return kept_choice(of_attempt(begun, read_events(folder.events_file)[0]))


def _to_be_repeated(folder: RunFolder, state: RunState) -> dict[int, tuple[Row, int]]:
    """Rows, and their number of passes, of an earlier attempt for steps from the state on, that must come
    out alike now: not those of an attempt in another environment, or from after the guard went back, or
    from before a person released samples.
    """
    events, _ = read_events(folder.events_file)
    other = {e["attempt"] for e in events if e["kind"] == "resumed" and e.get("environment_changed")}
    history = state.guard.history
    later = (e["interventions"] for e in events if e["kind"] in ("rolled_back", "released"))
    if max(later, default=0) > history.num_decided:
        return {}
    if any(i.kind == "release" and i.begins == state.step for i in history.interventions):
        return {}
    log = _log(folder)
    again = (log["step"] >= state.step) & (log["step"] < state.step + REMEMBERED)
    again &= ~np.isin(log["attempt"], sorted(other))
    rows = zip(*(log[name][again].tolist() for name in (*Row._fields, "micro_batches")), strict=True)
    return {int(row[0]): (Row(*row[:-1]), int(row[-1])) for row in rows}


def _log(folder: RunFolder) -> Columns:
    """What a run reads of its log. Versions before wrote no verdicts: none is known to be fine."""
    log = lineage(read_log(folder.steps).columns)
    return {"verdict": np.full(len(log["step"]), NOT_FINITE, "float64")} | log


def _rows(folder: RunFolder, state: RunState) -> deque[Row]:
    """The last rows before the state, for the guard to compare a replay with."""
    log = _log(folder)
    before = log["step"] < state.step
    rows = zip(*(log[name][before][-REMEMBERED:].tolist() for name in Row._fields), strict=True)
    return deque((Row(*row) for row in rows), maxlen=REMEMBERED)


def _retention(operations: Operations) -> Retention:
    kept = operations.checkpoint
    return Retention(
        last=kept.keep_last,
        best=kept.keep_best,
        metric=kept.keep_metric,
        mode=kept.keep_mode,
        span_s=None if kept.keep_per is None else seconds(kept.keep_per, name="checkpoint.keep_per"),
        age_s=None if kept.keep_for is None else seconds(kept.keep_for, name="checkpoint.keep_for"),
    )


def _budget(operations: Operations, folder: RunFolder) -> Budget:
    limits = operations.budget
    rows = read_log(folder.steps).columns
    return Budget(
        seconds=None if limits.time is None else seconds(limits.time, name="budget.time"),
        updates=limits.updates,
        cost=limits.cost,
        spent_s=float(rows["wall_s"].sum()),
        spent=float(rows["cost"].sum()),
    )


def _notes(recipe: Recipe, operations: Operations, choice: Choice) -> list[str]:
    notes = [choice.reason] if choice.reason else []
    if operations.data.workers and not isinstance(recipe.data, KeyedSource):
        notes.append(f"data.workers = {operations.data.workers} is not needed: the source is gathered here")
    return notes
