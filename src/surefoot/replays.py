"""Replay: takes steps of a run again, compares them with the log, and looks into the last of them.

Nothing is written to the run directory. The rows of the log are the lineage: where the run went back and
on otherwise, what is replayed is the way that led to its weights.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.checkpoint.store import DirectoryStore
from surefoot.choice import kept_choice
from surefoot.course import Course, callers_generators, replay
from surefoot.environment import differing, of_attempt
from surefoot.errors import RunDirectoryError, StateError
from surefoot.heal import REMEMBERED
from surefoot.operations import Operations
from surefoot.passes import gradient_norms, losses_of
from surefoot.prepare import prepare
from surefoot.recipe import Recipe
from surefoot.record.columns import COLUMNS, Columns
from surefoot.record.folder import RunFolder
from surefoot.resume import same_run
from surefoot.run import RunView
from surefoot.types import HOLE, Tree

_OF_THE_MACHINE = {"attempt", "micro_batches", "data_wait_s", "step_s", "wall_s", "cost", "time_s"}
"""Columns that a replay does not have to give again."""
_ROUNDING = 1e-3
"""Relative difference that another environment may make."""


class Difference(NamedTuple):
    """A number of a row that came out otherwise."""

    step: int
    column: str
    logged: float
    replayed: float


@dataclass(frozen=True)
class Replayed:
    """A step, taken again.

    begins: updates of the state that the replay began with. checkpoint: which held it; "" if it was made
    anew. differences: of the first row that differs. rounding: largest relative difference in any row.
    changed: parts of the environment that decide about bits and are not what they were. ids: int64[B], the
    samples of the step; -1 for a hole. losses: float64[B] of each. layers: 2-norm of the gradient of each
    parameter, before clipping, NaN where it has none. inputs: statistics of each tensor of the batch. row:
    of the log.
    """

    step: int
    begins: int
    checkpoint: str
    differences: list[Difference]
    rounding: float
    changed: dict[str, list[Any]]
    ids: list[int]
    losses: list[float]
    layers: dict[str, float]
    inputs: list[dict[str, Any]]
    row: dict[str, float]
    seconds: float

    @property
    def verdict(self) -> str:
        """``reproduced``: each row has the bits of the log. ``agrees``: to rounding, in another
        environment. ``differs``.
        """
        if not self.differences:
            return "reproduced"
        return "agrees" if self.changed and self.rounding <= _ROUNDING else "differs"

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        told = [difference._asdict() for difference in self.differences]
        return {"verdict": self.verdict, **vars(self), "differences": told}


class _Rows:
    """A record that keeps rows in memory."""

    attempt = 0

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def row(self, values: Sequence[int | float]) -> None:
        """Kept."""
        self.rows.append({c.name: float(v) for c, v in zip(COLUMNS, values, strict=True)})

    def event(self, kind: str, **facts: Any) -> None:
        """Forgotten: the run told of it then."""


def replay_step(
    recipe: Recipe,
    path: str | Path,
    *,
    step: int,
    operations: Operations | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Replayed:
    """Takes the updates from the newest earlier state up to `step` again.

    Args:
        path: of the run, which may be going on.
        step: counted from 0; the log must have its row.
        operations: where and how to compute. The number of threads is the run's unless they say another.
        say: is told where the replay begins, before it does.

    Raises:
        UsageError: the run has no such step, or was made by another recipe.
        StateError: what is needed to get there is damaged.
    """
    begun = time.perf_counter()
    view, operations = RunView(path), operations or Operations()
    log = view.log()
    made_in = _environment_of(view, _row_of(log, step, view)["attempt"])
    operations = _as_then(operations, made_in)
    threads_before = torch.get_num_threads()
    try:
        with callers_generators():
            return _replay(recipe, view, log, step, operations, made_in, say, begun)
    finally:
        torch.set_num_threads(threads_before)


def _replay(
    recipe: Recipe,
    view: RunView,
    log: Columns,
    step: int,
    operations: Operations,
    made_in: dict[str, Any],
    say: Callable[[str], None],
    begun: float,
) -> Replayed:
    made = prepare(recipe, operations, view.identity["origin"], kept=kept_choice(made_in))
    same_run(view.identity, made.identity, view.path, fix="Give the recipe as it was: --recipe FILE.")
    now = made.identity["environment"]
    changed = differing(made_in, now)
    store = DirectoryStore(RunFolder(view.path).checkpoints, run=view.identity["id"])
    told = _Rows()
    course = made.course(made.feed(told.event), store, told, deque(maxlen=REMEMBERED))
    state, guard, healer = course.state, course.parts.guard, course.healer
    history = view.history()
    _check_known(view, step, history.num_decided)
    state.restore(healer.nearest(step, history))
    guard.history, guard.pending = history, None
    begins = state.step
    names = [c.path.name for c in store.checkpoints() if c.step == begins]
    where = f"checkpoint {names[-1]}" if names and begins else "the first weights, made anew"
    say(f"replays {step + 1 - begins:,} steps, from {begins:,} ({where})")
    replay(course, step, [], known=True, told=told)
    if state.step != step:
        raise StateError(
            f"step {step} could not be reached again: the run stopped early after {state.step}."
        )
    batch = healer.batch(step)
    losses = losses_of(course.parts, batch)
    layers = gradient_norms(course.parts, batch)
    replay(course, step + 1, [], known=True, told=told)
    first, rounding = _compare(log, told.rows)
    row = _row_of(log, step, view)
    between = (log["step"] >= begins) & (log["step"] <= step)
    for attempt in sorted(set(log["attempt"][between].tolist())):
        changed |= differing(_environment_of(view, attempt), now)
    return Replayed(
        step=step,
        begins=begins,
        checkpoint=names[-1] if names and begins else "",
        differences=first,
        rounding=rounding,
        changed=changed,
        ids=batch.slots.ids.tolist(),
        losses=losses.tolist(),
        layers=dict(zip(_names(course), layers, strict=True)),
        inputs=_statistics(batch.data),
        row=row,
        seconds=round(time.perf_counter() - begun, 3),
    )


def _as_then(operations: Operations, made_in: dict[str, Any]) -> Operations:
    """With the threads and the layout that the rows were made with; other threads if told so."""
    then: dict[str, Any] = {}
    if operations.compute.threads is None:
        then["threads"] = made_in.get("threads")
    if operations.compute.micro_batch is None:
        then["micro_batch"] = made_in.get("micro_batch")
    then["layout"] = made_in.get("layout", "contiguous")
    return operations.model_copy(update={"compute": operations.compute.model_copy(update=then)})


def _row_of(log: Columns, step: int, view: RunView) -> dict[str, float]:
    found = (log["step"] == step).nonzero()[0]
    if not len(found):
        steps = log["step"]
        has = f"steps {int(steps[0])} to {int(steps[-1])}" if len(steps) else "no steps"
        raise RunDirectoryError(
            f"{view.path} has no step {step}.", why=f"Its log holds {has}.", fix="Give one of these."
        )
    return {name: float(values[found[0]]) for name, values in log.items()}


def _environment_of(view: RunView, attempt: float) -> dict[str, Any]:
    return of_attempt(view.identity["environment"], view.events(all_events=True), attempt)


def _check_known(view: RunView, step: int, num_decided: int) -> None:
    """Refuses what cannot come out as logged: what the guard did after the newest checkpoint is told by
    events only, and not all of it; and rows from before a release were made without the samples.
    """
    log = view.log()
    for event in view.events():
        before = (log["step"] >= event.get("step", 0)) & (log["step"] <= step)
        before &= log["attempt"] <= event["attempt"]
        if event["kind"] == "released" and before.any():
            raise RunDirectoryError(
                f"{view.path}: samples were released at step {event['step']}, and the run not continued.",
                why="The rows from there on were made without them.",
                fix="Continue the run, or replay an earlier step.",
            )
        if event.get("interventions", 0) > num_decided and event.get("step", 0) <= step:
            raise RunDirectoryError(
                f"{view.path}: the guard acted ({event['kind']}) after the newest checkpoint.",
                why="What follows from it is not kept yet, so later steps cannot be repeated.",
                fix="Continue the run until it has kept a checkpoint, or replay an earlier step.",
            )


def _compare(log: Columns, rows: list[dict[str, float]]) -> tuple[list[Difference], float]:
    """The differences of the first row that has any, and the largest relative one of all rows."""
    names = [name for name in log if name in rows[0] and name not in _OF_THE_MACHINE]
    at = {int(step): place for place, step in enumerate(log["step"].tolist())}
    first: list[Difference] = []
    largest = 0.0
    for row in rows:
        place = at.get(int(row["step"]))
        if place is None:
            continue
        pairs = [Difference(int(row["step"]), n, float(log[n][place]), row[n]) for n in names]
        found = [
            d
            for d in pairs
            if d.logged != d.replayed and not (math.isnan(d.logged) and math.isnan(d.replayed))
        ]
        first = first or found
        largest = max([largest, *map(_relative, found)])
    return first, largest


def _relative(difference: Difference) -> float:
    _, _, logged, replayed = difference
    scale = max(abs(logged), abs(replayed))
    return abs(logged - replayed) / scale if math.isfinite(scale) else math.inf


def _names(course: Course) -> list[str]:
    by_id = {id(p): name for name, p in course.parts.model.named_parameters()}
    return [by_id[id(p)] for p in course.parts.params]


def _statistics(data: Tree, name: str = "") -> list[dict[str, Any]]:
    """Of each tensor in a batch: name, shape, dtype; least, largest, mean and standard deviation of its
    finite numbers, and how many are not finite.
    """
    if isinstance(data, dict):
        return [one for key, part in data.items() for one in _statistics(part, f"{name}{key}.")]
    if isinstance(data, tuple | list):
        return [one for key, part in enumerate(data) for one in _statistics(part, f"{name}{key}.")]
    told: dict[str, Any] = {"name": name.rstrip(".") or "data", "type": type(data).__name__}
    if not isinstance(data, Tensor):
        return [told]
    numbers = data.detach().double().flatten() if not data.is_complex() else data.abs().double().flatten()
    finite = numbers[torch.isfinite(numbers)]
    told |= {
        "type": str(data.dtype).removeprefix("torch."),
        "shape": list(data.shape),
        "not_finite": numbers.numel() - finite.numel(),
    }
    if finite.numel():
        told |= {
            "least": finite.min().item(),
            "largest": finite.max().item(),
            "mean": finite.mean().item(),
            "std": finite.std(correction=0).item(),
        }
    return [told]


def worst(replayed: Replayed, most: int = 10) -> list[tuple[int, float]]:
    """The samples with the highest losses: (id, loss); what is not finite first."""
    pairs = [(i, x) for i, x in zip(replayed.ids, replayed.losses, strict=True) if i != HOLE]
    return sorted(pairs, key=lambda p: (math.isfinite(p[1]), -p[1]))[:most]
