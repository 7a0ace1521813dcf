"""What a recipe and operations give, made and checked before anything is known of a run directory."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from surefoot.checkpoint.snapshot import Snapshot
from surefoot.checkpoint.store import DirectoryStore
from surefoot.choice import Choice, Kept, Question, choose
from surefoot.course import Course, Record, first_failure
from surefoot.data.feed import Feed
from surefoot.data.plan import Cadence, Plan
from surefoot.data.sources import describe_source
from surefoot.draws import Generators
from surefoot.environment import code_commit, command_line, environment
from surefoot.errors import (
    DataError,
    OperationsError,
    RecipeError,
    SurefootError,
    nearest,
)
from surefoot.guard.watch import Watch
from surefoot.heal import Healer, Row
from surefoot.identity import describe, describe_model
from surefoot.keep import Auto
from surefoot.keys import key
from surefoot.measure.evaluate import Evaluation
from surefoot.measure.readings import Readings
from surefoot.model import make_model, physical_rows
from surefoot.operations import Operations, seconds
from surefoot.optim.buffers import Buffers
from surefoot.optim.groups import parameter_groups, table
from surefoot.optim.patience import EarlyStopping, Patience
from surefoot.optim.places import Places
from surefoot.optim.precision import Precision
from surefoot.optim.schedules import Plateau, Resolved, resolve
from surefoot.optim.specs import build_optimizer
from surefoot.optim.update import Updater
from surefoot.parallel.device import Kernels, choose_device
from surefoot.parallel.single import Single
from surefoot.protocols import Weighing
from surefoot.recipe import Recipe, Validation
from surefoot.state import RunState
from surefoot.train_step import Parts
from surefoot.trials import Trial
from surefoot.types import DurationLike, duration

_MOST_UPDATES = 1 << 48
_MEASURED_EVERY_STEP = 1 << 17
_MEASURED_SELDOM = 16
_ROWS_FOR_BATCH_NORM, _FATAL_FOR_BATCH_NORM = 8, 4


@dataclass(frozen=True)
class Prepared:
    """What a recipe gives under some operations, before anything is known of a run directory.

    origin: see `build`. initial: makes the state before the first update anew.
    """

    recipe: Recipe
    operations: Operations
    device: torch.device
    plan: Plan
    total: int
    schedule: Resolved
    model: nn.Module
    parts: Parts
    state: RunState
    groups: list[dict[str, Any]]
    evaluation: Evaluation | None
    validate: Cadence | None
    keep_every: Cadence | float | Auto
    choice: Choice
    identity: dict[str, Any]

    def initial(self) -> Snapshot:
        """The state before the first update, made anew."""
        again = _model(self.recipe, self.operations, self.device)
        made = _assemble(self.recipe, self.operations, again, self.device, self.plan, self.schedule)
        return made[1].snapshot()

    def feed(self, notice: Callable[..., object]) -> Feed:
        """Its batches. notice: is told of workers that were replaced."""
        data = self.operations.data
        return Feed(
            self.recipe.data,
            self.plan,
            self.recipe.seed,
            self.device,
            data.workers,
            data.prefetch,
            timeout_s=seconds(data.timeout, name="data.timeout"),
            notice=notice,
        )

    def course(self, feed: Feed, store: DirectoryStore, told: Record, rows: deque[Row]) -> Course:
        """Updates from the state on. rows: the last before it."""
        doubts = self.doubts() if min(self.parts.micro, self.parts.physical) < _FATAL_FOR_BATCH_NORM else []
        healer = Healer(
            parts=self.parts,
            state=self.state,
            feed=feed,
            schedule=self.schedule,
            store=store,
            total=self.total,
            num_samples=self.plan.num_samples,
            initial=self.initial,
            doubts=doubts,
            own_from=self.state.step,
            rows=rows,
        )
        if self.choice.graph is None:
            self.parts.updater.go_end_to_end()
        stops_early = self.recipe.early_stopping
        return Course(
            parts=self.parts,
            state=self.state,
            feed=feed,
            schedule=self.schedule,
            total=self.total,
            healer=healer,
            graph=self.choice.graph,
            told=told,
            evaluation=self.evaluation,
            validate=self.validate,
            early_stopping_metric=stops_early.metric if stops_early else "",
            readings=Readings(self.device),
            rows=rows,
            price_per_s=self.operations.budget.price_per_hour / 3600,
        )

    def doubts(self) -> list[str]:
        """What is likely to go wrong, told before the first step."""
        rows = min(self.parts.micro, self.parts.physical)
        norms = [name for name, module in self.model.named_modules() if isinstance(module, _BatchNorm)]
        if not norms or rows >= _ROWS_FOR_BATCH_NORM:
            return []
        return [
            f"warning: batch norm ({norms[0]}) over {rows} samples at once: its statistics are mostly "
            f"noise. Use GroupNorm, or micro-batches of at least {_ROWS_FOR_BATCH_NORM}"
        ]


def prepare(
    recipe: Recipe,
    operations: Operations,
    origin: Mapping[str, Any] | None = None,
    *,
    kept: Kept | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Prepared:
    """Checks a recipe with operations as far as that can be done before anything is written.

    kept: how the run that goes on, or is replayed, was computed. say: is told of what takes a while.

    Raises:
        UsageError: they do not fit.
    """
    check_kinds(recipe, operations)
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
    model = _model(recipe, operations, device)
    identity = _identity(recipe, plan, model, origin)
    parts, state, groups = _assemble(recipe, operations, model, device, plan, schedule)
    evaluation = _evaluation(recipe, operations, parts, plan)
    _check_watched(recipe, operations, schedule, evaluation, model)
    feed = Feed(recipe.data, plan, recipe.seed, device)
    computed = operations.compute
    question = Question(computed.compile, computed.threads, kept, Trial(parts, state, feed.at, total), say)
    try:
        choice = choose(question)
    except (SurefootError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise first_failure("first step", error) from error
    if choice.objective is not None:
        parts = replace(parts, objective=choice.objective)
    identity |= {
        "total_updates": total,
        "groups": groups,
        "environment": environment(
            device,
            compiled=choice.compiled,
            micro_batch=operations.compute.micro_batch,
            layout=operations.compute.layout,
        ),
        "command": command_line(),
        "commit": code_commit(),
    }
    return Prepared(
        recipe=recipe,
        operations=operations,
        device=device,
        plan=plan,
        total=total,
        schedule=schedule,
        model=model,
        parts=parts,
        state=state,
        groups=groups,
        evaluation=evaluation,
        validate=validate,
        keep_every=keep_every,
        choice=choice,
        identity=json.loads(json.dumps(identity)),  # what is compared later is what was written
    )


def _model(recipe: Recipe, operations: Operations, device: torch.device) -> nn.Module:
    model = make_model(recipe.model, seed=recipe.seed, device=device)
    if operations.compute.layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def check_kinds(recipe: Any, operations: Any) -> None:
    """Whether they are a recipe and operations at all."""
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"expected a Recipe, got {type(recipe).__name__}.")
    if not isinstance(operations, Operations):
        what = type(operations).__name__
        raise OperationsError(f"expected Operations, got {what}.", fix='Operations(device="cpu")')


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
    guard = Watch(recipe.guard, device)
    micro = min(recipe.batch.micro or plan.batch_size, plan.batch_size)
    parts = Parts(
        model=model,
        objective=recipe.objective,
        weigh=recipe.objective.weigh if isinstance(recipe.objective, Weighing) else None,
        params=params,
        places=Places(model, params),
        buffers=Buffers(model, rows=micro),
        transforms=recipe.gradient,
        guard=guard,
        updater=Updater(optimizer, params, measure_every=1 if small else _MEASURED_SELDOM),
        base_lr=base_lr,
        precision=precision,
        strategy=Single(),
        device=device,
        draws=key(recipe.seed, "forward"),
        generators=Generators(device),
        micro=micro,
        physical=physical_rows(operations.compute.micro_batch, micro, model),
        kernels=Kernels(device, deterministic=operations.compute.deterministic),
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


def _keep_every(
    operations: Operations, cadence: Callable[[DurationLike, str], Cadence]
) -> Cadence | float | Auto:
    kept = operations.checkpoint
    if kept.every == "auto":
        return Auto(kept.overhead, seconds(kept.risk, name="checkpoint.risk"))
    every = duration(kept.every, name="checkpoint.every")
    return float(every.value) if every.unit == "s" else cadence(every, "checkpoint.every")


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
        forward=parts.precision.evaluation,
        seed=lambda: parts.generators.seed(draws),
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
            raise RecipeError(
                f"{who} needs a validation.",
                why="It watches a validation metric.",
                fix="validation=Validation(source)",
            )
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
