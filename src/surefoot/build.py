"""Joining a recipe with operations into a run.

`build` checks everything that can be checked before the first file is written. Then it opens the run
directory: a new run is begun, an interrupted one continued from its newest sound checkpoint.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import UninitializedParameter

from surefoot.checkpoint.store import DirectoryStore
from surefoot.checkpoint.tensors import can_keep
from surefoot.data.feed import Feed
from surefoot.data.plan import Cadence, Plan
from surefoot.data.sources import describe_source
from surefoot.errors import (
    DataError,
    OperationsError,
    RecipeError,
    RunDirectoryError,
    StateError,
    SurefootError,
    nearest,
)
from surefoot.identity import (
    DECIDES_BITS,
    code_commit,
    command_line,
    describe,
    describe_model,
    differences,
    environment,
)
from surefoot.keys import key
from surefoot.measure.evaluate import Evaluation
from surefoot.measure.readings import Readings
from surefoot.operations import Operations
from surefoot.optim.groups import parameter_groups, table
from surefoot.optim.patience import EarlyStopping, Patience
from surefoot.optim.precision import Precision
from surefoot.optim.schedules import Plateau, Resolved, resolve
from surefoot.optim.specs import build_optimizer
from surefoot.optim.update import Buffers, Updater
from surefoot.parallel.single import Single
from surefoot.protocols import KeyedSource, Objective, Weighing
from surefoot.recipe import Recipe, Validation
from surefoot.record.events import read_events
from surefoot.record.folder import RunFolder
from surefoot.record.recorder import Recorder
from surefoot.state import RunState
from surefoot.train_step import Parts, seed_generators
from surefoot.train import Run
from surefoot.types import DurationLike, duration

TERMINAL = ("finished", "stopped_early", "diverged")
"""Statuses after which a run does not go on."""

_MEASURED_EVERY_STEP = 1 << 17
_MEASURED_SELDOM = 16


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
    folder.holds_run()  # complain before the work
    device = _device(operations)
    plan = _plan(recipe)
    total = plan.updates(duration(recipe.until, name="until"), of=None, name="until")

    def measure(length: DurationLike, name: str) -> int:
        return plan.updates(duration(length, name=name), of=total, name=name)

    def cadence(every: DurationLike, name: str) -> Cadence:
        return plan.cadence(duration(every, name=name), of=total, name=name)

    schedule = resolve(recipe.schedule, total, measure)
    validate = cadence(recipe.validation.every, "validation.every") if recipe.validation else None
    keep_every = duration(operations.checkpoint.every, name="checkpoint.every")
    model = _model(recipe, device)
    identity = _identity(recipe, plan, model, origin)
    parts, state, groups = _assemble(recipe, operations, model, device, plan, schedule)
    evaluation = _evaluation(recipe, operations, parts, plan)
    _check_watched(recipe, schedule, evaluation, model)
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
    store = DirectoryStore(folder.checkpoints, keep_last=operations.checkpoint.keep_last)
    record, ended, notes = _open(folder, identity, state, store)
    notes += _notes(recipe, operations)
    if record is None:
        return Build(folder, state, None, ended, notes, groups)
    feed = Feed(recipe.data, plan, recipe.seed, device, operations.data.workers, operations.data.prefetch)
    run = Run(
        parts=parts,
        state=state,
        feed=feed,
        schedule=schedule,
        total=total,
        store=store,
        record=record,
        evaluation=evaluation,
        validate=validate,
        keep_every=float(keep_every.value)
        if keep_every.unit == "s"
        else cadence(keep_every, "checkpoint.every"),
        early_stopping_metric=recipe.early_stopping.metric if recipe.early_stopping else "",
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
    base_lr = [float(g["lr"]) * g["lr_scale"] for g in optimizer.param_groups]
    if not all(math.isfinite(lr) for lr in base_lr):
        raise RecipeError(f"optimizer: the learning rate is {base_lr[0]}.", fix="Give a finite one.")
    groups = [{**row, "lr": lr} for row, lr in zip(table(optimizer.param_groups), base_lr, strict=True)]
    params = [p for p in model.parameters() if p.requires_grad]
    small = sum(p.numel() for p in params) <= _MEASURED_EVERY_STEP
    precision = Precision(recipe.precision, device)
    guard = recipe.guard.build()
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
        physical=_physical(operations.compute.micro_batch, micro, model),
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


# ------------------------------------------------------------------------- the run directory


def _open(
    folder: RunFolder, identity: dict[str, Any], state: RunState, store: DirectoryStore
) -> tuple[Recorder | None, str, list[str]]:
    """Begins or continues the run: its recorder (None if it has ended), status if so, and notes."""
    lock = folder.lock()
    try:
        if not folder.holds_run():
            folder.create(identity)
            record = Recorder(folder, lock, attempt=1)
            record.event("started", step=0, environment=identity["environment"])
            return record, "", []
        before = folder.identity()
        _same_run(before, identity, folder)
        events, _ = read_events(folder.events_file)
        notes, checkpoint = _restore(state, store)
        if not checkpoint and any(e["kind"] == "checkpointed" for e in events):
            raise StateError(
                f"{folder.checkpoints} is empty, but the run has kept checkpoints there.",
                why="Starting anew silently would hide that they are lost.",
                fix="Restore the folder from a copy, or start anew with --fresh or another --out.",
            )
        ended = events[-1].get("status", "") if events and events[-1]["kind"] == "ended" else ""
        if ended in TERMINAL and (checkpoint or state.step):
            lock.release()
            return None, ended, notes
        attempt = 1 + max((e["attempt"] for e in events), default=0)
        record = Recorder(folder, lock, attempt=attempt)
    except BaseException:
        lock.release()
        raise
    for line in notes:
        record.event("checkpoint_rejected", step=state.step, reason=line)
    now, then = identity["environment"], before["environment"]
    changed = {k: [then.get(k), now[k]] for k in DECIDES_BITS if then.get(k) != now[k]}
    record.event("resumed", step=state.step, checkpoint=checkpoint, environment_changed=changed)
    where = f"from checkpoint {checkpoint}" if checkpoint else "no checkpoint was completed before"
    notes.append(f"continues at step {state.step} ({where}), attempt {attempt}")
    if changed:
        what = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items())
        notes.append(f"the environment changed ({what}): equal to rounding, not to the bit")
    return record, "", notes


def _restore(state: RunState, store: DirectoryStore) -> tuple[list[str], str]:
    """Restores the newest sound checkpoint: why others were rejected, and its name ('' if none).

    Raises:
        StateError: there are checkpoints, but none is sound.
    """
    rejected: list[str] = []
    for checkpoint in reversed(store.checkpoints()):
        try:
            state.restore(store.load(checkpoint))
        except StateError as error:
            rejected.append(f"checkpoint {checkpoint.path.name} rejected: {error.what}")
            continue
        return rejected, checkpoint.path.name
    if rejected:
        raise StateError(
            "the run has checkpoints, but none is sound.\n  " + "\n  ".join(rejected),
            why="Starting anew silently would throw the run away.",
            fix="Restore the folder from a copy, or start anew with another --out.",
        )
    return [], ""


def _same_run(before: dict[str, Any], now: dict[str, Any], folder: RunFolder) -> None:
    lines = differences(*(d["origin"].get("options", {}) for d in (before, now)))
    if before["environment"]["torch"] != now["environment"]["torch"]:  # may draw other first weights
        now["recipe"]["model"]["initial"] = before["recipe"]["model"].get("initial")
    for part in ("recipe", "data", "plan"):
        lines += differences(before[part], now[part], part)
    if lines:
        raise RunDirectoryError(
            f"{folder.path} holds a run of another recipe:\n    " + "\n    ".join(lines),
            why="Going on with another recipe would be neither run.",
            fix="Give another --out; or take the change back to continue; or add --fresh, which "
            "moves the old run aside.",
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


# ------------------------------------------------------------------------- what is needed for it


def _device(operations: Operations) -> torch.device:
    """The device, and what is process-wide about it."""
    if operations.compute.threads is not None:
        torch.set_num_threads(operations.compute.threads)
    if operations.device == "auto":
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    else:
        try:
            device = torch.device(operations.device)
        except RuntimeError:
            raise OperationsError(
                f"device = {operations.device!r} is unknown.", fix="Use cpu, cuda, cuda:1 or auto."
            ) from None
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type not in ("cpu", "cuda"):
        raise OperationsError(f"device = {operations.device!r}: surefoot runs on cpu and cuda.")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise OperationsError(
                f"device = {operations.device!r}: torch sees {torch.cuda.device_count()} GPUs.",
                fix="Use cpu or auto, or install a torch build for this GPU.",
            )
        if operations.compute.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.benchmark = False
    return device


def _keep_freed_memory() -> None:
    """Lets glibc keep up to 1 GiB of freed memory instead of returning it to the system after each step,
    to be faulted in again page by page: a quarter of the time of a small convolutional network
    (docs/decisions/0009). Where the C library has no such settings, nothing happens.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_mmap_threshold, 32 << 20)
    mallopt(m_trim_threshold, 1 << 30)
    mallopt(m_top_pad, 64 << 20)


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


def _model(recipe: Recipe, device: torch.device) -> nn.Module:
    """The model as made after seeding, on the device; the process's generators stay as they were."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(recipe.seed)
        np.random.seed(recipe.seed % (1 << 32))
        torch.manual_seed(recipe.seed)
        model = recipe.model()
    except SurefootError:
        raise
    except Exception as error:
        raise RecipeError(f"model() raised {type(error).__name__}: {error}") from error
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model() made a {type(model).__name__}, not a torch.nn.Module.")
    lazy = [n for n, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise RecipeError(
            f"model has parameters without a shape yet: {', '.join(lazy[:3])}.",
            fix="Run one batch through it in the function that makes it, or give the sizes.",
        )
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and not can_keep(tensor):
            raise RecipeError(
                f"model: {name} is a {tensor.dtype} tensor of layout {tensor.layout}, which checkpoints "
                "cannot hold.",
                fix="Register it as a dense tensor of a common dtype.",
            )
    if not model.training:  # as pretrained models come; single modules keep their own mode
        model.train()
    return model.to(device)


def _physical(wanted: int | None, micro: int, model: nn.Module) -> int:
    """Rows through the model at once. Splitting further than the recipe does must not change what is
    learned, so it is refused where the rows of a micro-batch are not independent.
    """
    if wanted is None or wanted >= micro:
        return micro
    for name, module in model.named_modules():
        drops = isinstance(module, _DropoutNd) and module.p > 0
        if drops or (isinstance(module, _BatchNorm) and module.training):
            raise OperationsError(
                f"compute.micro_batch = {wanted} would split the recipe's micro-batch of {micro}.",
                why=f"{name} ({type(module).__name__}) treats the rows of a micro-batch together, so "
                "the split would change what is learned.",
                fix=f"Set batch.micro = {wanted} in the recipe, or leave compute.micro_batch out.",
            )
    return wanted


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
    recipe: Recipe, schedule: Resolved, evaluation: Evaluation | None, model: nn.Module
) -> None:
    """Tries the validation on one batch, and that what is watched is among its metrics."""
    watched = {"early_stopping": recipe.early_stopping.metric} if recipe.early_stopping else {}
    if schedule.plateau is not None:
        watched["plateau"] = schedule.plateau[1].metric
    if evaluation is None:
        if watched:
            raise RecipeError("plateau needs a validation.", why="It watches a validation metric.")
        return
    known = evaluation(model, most=1) or {}
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
