"""Joining a recipe with operations into a run.

`build` checks everything that can be checked before the first file is written. Then it opens the run
directory: a new run is begun, an interrupted one continued from its newest sound checkpoint.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from surefoot.checkpoint.retention import Retention
from surefoot.checkpoint.snapshot import Snapshot
from surefoot.checkpoint.writer import Writer
from surefoot.data.feed import Feed
from surefoot.data.plan import Cadence, Plan
from surefoot.data.sources import describe_source
from surefoot.environment import code_commit, command_line, environment
from surefoot.errors import (
    DataError,
    OperationsError,
    RecipeError,
    SurefootError,
    nearest,
)
from surefoot.guard.hang import stacks_if_stuck
from surefoot.heal import REMEMBERED, Healer, Row
from surefoot.identity import describe, describe_model
from surefoot.keep import Auto, Keeper
from surefoot.keys import key
from surefoot.measure.evaluate import Evaluation
from surefoot.measure.readings import Readings
from surefoot.model import make_model, physical_rows
from surefoot.operations import Operations, seconds
from surefoot.optim.buffers import Buffers
from surefoot.optim.groups import parameter_groups, table
from surefoot.optim.patience import EarlyStopping, Patience
from surefoot.optim.precision import Precision
from surefoot.optim.schedules import Plateau, Resolved, resolve
from surefoot.optim.specs import build_optimizer
from surefoot.optim.update import Updater
from surefoot.parallel.device import choose_device
from surefoot.parallel.single import Single
from surefoot.protocols import KeyedSource, Objective, Weighing
from surefoot.recipe import Recipe, Validation
from surefoot.record.columns import lineage
from surefoot.record.folder import RunFolder
from surefoot.record.rows import read_log
from surefoot.resume import begin_or_continue
from surefoot.state import RunState
from surefoot.stopping import Budget
from surefoot.train import Run, first_failure
from surefoot.train_step import Parts, seed_generators
from surefoot.types import DurationLike, duration

_MOST_UPDATES = 1 << 48
_MEASURED_EVERY_STEP = 1 << 17
_MEASURED_SELDOM = 16
_ROWS_FOR_BATCH_NORM, _FATAL_FOR_BATCH_NORM = 8, 4


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
) -> Build:
    """Makes a run of `recipe` ready in `folder`.

    Args:
        origin: what is to be recorded of where the recipe came from: ``file`` and ``options``.
        fresh: a run that lies in `folder` is moved aside, once everything else is in order.

    Raises:
        UsageError: recipe, operations or folder do not fit; nothing was changed.
        StateError: the run has checkpoints, but none is sound.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"expected a Recipe, got {type(recipe).__name__}.")
    if not isinstance(operations, Operations):
        what = type(operations).__name__
        raise OperationsError(f"expected Operations, got {what}.", fix='Operations(device="cpu")')
    with stacks_if_stuck(seconds(operations.hang_after, name="hang_after")):
        return _build(recipe, folder, operations, origin, fresh)


def _build(
    recipe: Recipe,
    folder: RunFolder,
    operations: Operations,
    origin: Mapping[str, Any] | None,
    fresh: bool,
) -> Build:
    folder.holds_run()  # complain before the work
    threads_before = torch.get_num_threads()
    device = choose_device(
        operations.device,
        threads=operations.compute.threads,
        deterministic=operations.compute.deterministic,
    )
    plan = _plan(recipe)
    total = plan.updates(duration(recipe.until, name="until"), of=None, name="until")
    if total > _MOST_UPDATES:
        raise RecipeError(f"until = {recipe.until!r} is more updates than any run finishes.")

    def measure(length: DurationLike, name: str) -> int:
        return plan.updates(duration(length, name=name), of=total, name=name)

    def cadence(every: DurationLike, name: str) -> Cadence:
        return plan.cadence(duration(every, name=name), of=total, name=name)

    schedule = resolve(recipe.schedule, total, measure)
    validate = cadence(recipe.validation.every, "validation.every") if recipe.validation else None
    keep_every = _keep_every(operations, cadence)
    model = make_model(recipe.model, seed=recipe.seed, device=device)
    identity = _identity(recipe, plan, model, origin)
    parts, state, groups = _assemble(recipe, operations, model, device, plan, schedule)
    evaluation = _evaluation(recipe, operations, parts, plan)
    _check_watched(recipe, operations, schedule, evaluation, model)
    compiled = operations.compute.compile == "on"
    identity |= {
        "total_updates": total,
        "groups": groups,
        "environment": environment(device, compiled=compiled),
        "command": command_line(),
        "commit": code_commit(),
    }
    identity = json.loads(json.dumps(identity))  # what is compared later is what was written
    if fresh:
        folder.move_aside()
    opened = begin_or_continue(folder, identity, state, _retention(operations))
    record, ended, notes = opened.record, opened.ended, opened.notes
    notes += _notes(recipe, operations)
    if record is None:
        return Build(folder, state, None, ended, notes, groups)
    feed = Feed(
        recipe.data,
        plan,
        recipe.seed,
        device,
        operations.data.workers,
        operations.data.prefetch,
        timeout_s=seconds(operations.data.timeout, name="data.timeout"),
        notice=record.event,
    )
    keeper = Keeper(
        state=state,
        record=record,
        writer=Writer(opened.store, before=record.make_durable),
        store=opened.store,
        every=keep_every,
        total=total,
        deadline_s=seconds(operations.checkpoint.grace, name="checkpoint.grace"),
        ballast=folder.ballast,
        newest=opened.checkpoint,
    )
    keeper.prepare_ballast()

    def initial() -> Snapshot:
        """The state before the first update, made anew."""
        again = make_model(recipe.model, seed=recipe.seed, device=device)
        return _assemble(recipe, operations, again, device, plan, schedule)[1].snapshot()

    doubts = _doubts(model, parts)
    notes += doubts
    fatal = doubts if min(parts.micro, parts.physical) < _FATAL_FOR_BATCH_NORM else []
    healer = Healer(
        parts=parts,
        state=state,
        feed=feed,
        schedule=schedule,
        store=opened.store,
        total=total,
        num_samples=plan.num_samples,
        initial=initial,
        doubts=fatal,
        own_from=state.step,
        rows=_rows(folder, state),
    )
    run = Run(
        parts=parts,
        state=state,
        feed=feed,
        schedule=schedule,
        total=total,
        keeper=keeper,
        healer=healer,
        rows=healer.rows,
        record=record,
        told=record,
        evaluation=evaluation,
        validate=validate,
        budget=_budget(operations, folder),
        price_per_s=operations.budget.price_per_hour / 3600,
        hang_after_s=seconds(operations.hang_after, name="hang_after"),
        early_stopping_metric=recipe.early_stopping.metric if recipe.early_stopping else "",
        threads_before=threads_before,
        fresh=record.attempt == 1,
        readings=Readings(device),
    )
    return Build(folder, state, run, ended, notes, groups)


def _assemble(
    recipe: Recipe,
    operations: Operations,
    model: nn.Module,
    device: torch.device,
    plan: Plan,
    schedule: Resolved,
) -> tuple[Parts, RunState, list[dict[str, Any]]]:
    """The parts of a step, the state of the run, and the table of parameter groups."""
    decays = getattr(recipe.optimizer, "weight_decay", None) != 0
    grouped = parameter_groups(model, recipe.groups, decays=decays)
    optimizer = build_optimizer(recipe.optimizer, grouped)
    if not all("lr_scale" in g and "lr" in g for g in optimizer.param_groups):
        raise RecipeError(
            f"optimizer {type(optimizer).__name__} was built over other parameters than it was given.",
            why="surefoot sets the learning rate of the groups that it makes.",
            fix="Pass the groups on: lambda groups: MyOptimizer(groups, lr=0.1).",
        )
    base_lr = [float(g["lr"]) * g["lr_scale"] for g in optimizer.param_groups]
    if not all(math.isfinite(lr) for lr in base_lr):
        raise RecipeError(f"optimizer: the learning rate is {base_lr[0]}.", fix="Give a finite one.")
    groups = [{**row, "lr": lr} for row, lr in zip(table(optimizer.param_groups), base_lr, strict=True)]
    params = [p for p in model.parameters() if p.requires_grad]
    small = sum(p.numel() for p in params) <= _MEASURED_EVERY_STEP
    precision = Precision(recipe.precision, device)
    guard = recipe.guard.build(device)
    micro = min(recipe.batch.micro or plan.batch_size, plan.batch_size)
    parts = Parts(
        model=model,
        objective=_compiled(recipe.objective, operations),
        weigh=recipe.objective.weigh if isinstance(recipe.objective, Weighing) else None,
        params=params,
        buffers=Buffers(model),
        transforms=recipe.gradient,
        guard=guard,
        updater=Updater(optimizer, params, measure_every=1 if small else _MEASURED_SELDOM),
        base_lr=base_lr,
        precision=precision,
        strategy=Single(),
        device=device,
        draws=key(recipe.seed, "forward"),
        micro=micro,
        physical=physical_rows(operations.compute.micro_batch, micro, model),
    )
    state = RunState(
        model=model,
        buffers=parts.buffers,
        optimizer=optimizer,
        scale=precision.scale,
        guard=guard,
        plateau=_patience(schedule.plateau[1] if schedule.plateau else None),
        early_stopping=_patience(recipe.early_stopping),
    )
    return parts, state, groups


def _doubts(model: nn.Module, parts: Parts) -> list[str]:
    """What is likely to go wrong, told before the first step."""
    rows = min(parts.micro, parts.physical)
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if not norms or rows >= _ROWS_FOR_BATCH_NORM:
        return []
    return [
        f"warning: batch norm ({norms[0]}) over {rows} samples at once: its statistics are mostly noise. "
        f"Use GroupNorm, or micro-batches of at least {_ROWS_FOR_BATCH_NORM}"
    ]


def _rows(folder: RunFolder, state: RunState) -> deque[Row]:
    """The last rows before the state, for the guard to compare a replay with."""
    log = lineage(read_log(folder.steps).columns)
    before = log["step"] < state.step
    names = ("step", "loss", "grad_norm", "permitted")
    rows = zip(*(log[name][before][-REMEMBERED:].tolist() for name in names), strict=True)
    return deque((Row(*row) for row in rows), maxlen=REMEMBERED)


def _keep_every(
    operations: Operations, cadence: Callable[[DurationLike, str], Cadence]
) -> Cadence | float | Auto:
    kept = operations.checkpoint
    if kept.every == "auto":
        return Auto(kept.overhead, seconds(kept.risk, name="checkpoint.risk"))
    every = duration(kept.every, name="checkpoint.every")
    return float(every.value) if every.unit == "s" else cadence(every, "checkpoint.every")


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


def _identity(
    recipe: Recipe, plan: Plan, model: nn.Module, origin: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What makes a run this run, as JSON."""
    described = {
        name: describe(getattr(recipe, name))
        for name in recipe.__dataclass_fields__
        if name not in ("model", "data", "validation")
    }
    data: dict[str, Any] = {"train": describe_source(recipe.data)}
    if recipe.validation is not None:
        v = recipe.validation
        described["validation"] = {
            "metrics": describe({n: m for n, m in v.metrics.items() if callable(m)}),
            "every": describe(v.every),
        }
        data["validation"] = describe_source(v.source)
    described["model"] = describe_model(model)
    return {
        "origin": describe(origin or {}),
        "recipe": described,
        "data": data,
        "plan": plan.describe(),
    }


def _plan(recipe: Recipe) -> Plan:
    num_samples = _length(recipe.data, "data")
    size = num_samples if recipe.batch.size == "full" else recipe.batch.size
    return Plan(num_samples, size, recipe.batch.tail, recipe.batch.shuffle, recipe.seed)


def _length(source: Any, name: str) -> int:
    try:
        length = len(source)
    except TypeError as error:
        raise DataError(f"{name} has no length: {error}.") from None
    if length < 1:
        raise DataError(f"{name} is empty.", fix="Give a source with at least one sample.")
    return length


def _compiled(objective: Objective, operations: Operations) -> Objective:
    if operations.compute.compile != "on":
        return objective

    def forward(model: nn.Module, data: Any) -> Tensor | tuple[Tensor, Tensor]:
        return objective(model, data)

    compiled: Objective = torch.compile(forward, dynamic=False)
    return compiled


def _patience(rule: Plateau | EarlyStopping | None) -> Patience | None:
    if rule is None:
        return None
    borne = rule.patience - 1 if isinstance(rule, EarlyStopping) else rule.patience
    return Patience(patience=borne, mode=rule.mode, min_delta=rule.min_delta)


def _evaluation(recipe: Recipe, operations: Operations, parts: Parts, plan: Plan) -> Evaluation | None:
    if recipe.validation is None:
        return None
    v: Validation = recipe.validation
    num_samples = _length(v.source, "validation.source")
    size = min(v.batch or plan.batch_size, num_samples)
    in_order = Plan(num_samples, size, "keep", shuffle=False)
    feed = Feed(
        v.source,
        in_order,
        key(recipe.seed, "validation data"),
        parts.device,
        operations.data.workers,
        operations.data.prefetch,
        timeout_s=seconds(operations.data.timeout, name="data.timeout"),
        name="validation",
    )
    draws = key(recipe.seed, "validation")
    return Evaluation(
        objective=recipe.objective,
        metrics=v.metrics,
        batches=lambda: feed.batches(0, int(in_order.updates_per_epoch)),
        forward=parts.precision.forward,
        seed=lambda: seed_generators(draws, parts.device),
    )


def _check_watched(
    recipe: Recipe,
    operations: Operations,
    schedule: Resolved,
    evaluation: Evaluation | None,
    model: nn.Module,
) -> None:
    """Tries the validation on one batch, and that what is watched is among its metrics."""
    watched = {"early_stopping": recipe.early_stopping.metric} if recipe.early_stopping else {}
    if schedule.plateau is not None:
        watched["plateau"] = schedule.plateau[1].metric
    if operations.checkpoint.keep_best:
        watched["checkpoint.keep_best"] = operations.checkpoint.keep_metric
    if evaluation is None:
        if watched:
            who = " and ".join(watched)
            raise RecipeError(f"{who} needs a validation.", why="It watches a validation metric.")
        return
    try:
        known = evaluation(model, most=1) or {}
    except (SurefootError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise first_failure("first validation", error) from error
    for who, metric in watched.items():
        if metric not in known:
            raise RecipeError(
                f"{who} watches {metric!r}, which validation does not compute.",
                fix=nearest(metric, known),
            )


def _notes(recipe: Recipe, operations: Operations) -> list[str]:
    if operations.data.workers and not isinstance(recipe.data, KeyedSource):
        return [f"data.workers = {operations.data.workers} is not needed: the source is gathered here"]
    return []
