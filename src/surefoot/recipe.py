"""The recipe: what is to be learned, and nothing of how it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from surefoot.data.plan import Tail
from surefoot.errors import RecipeError
from surefoot.guard.guard import Guard
from surefoot.optim.groups import Group
from surefoot.optim.patience import EarlyStopping
from surefoot.optim.precision import PrecisionName
from surefoot.optim.schedules import Chain, Constant, Piece, Schedule
from surefoot.protocols import (
    GradientTransform,
    KeyedSource,
    Objective,
    OptimizerFactory,
    OptimizerSpec,
    Source,
)
from surefoot.types import DurationLike


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one update.

    Args:
        size: samples per update, or ``"full"`` for all of them.
        micro: rows that go through the model at once, each such micro-batch with its own dropout and
            batch statistics; left out, the whole batch. The gradient is the same for any value.
        shuffle: a new order each epoch; False keeps the source's order.
        tail: what becomes of an epoch's last, short batch: ``keep``, ``drop``, ``straddle`` or
            ``pad``; see `surefoot.data.plan.Plan`.
    """

    size: int | Literal["full"]
    micro: int | None = field(default=None, kw_only=True)
    shuffle: bool = field(default=True, kw_only=True)
    tail: Tail = field(default="keep", kw_only=True)

    def __post_init__(self) -> None:
        if self.size != "full" and (not _is_int(self.size) or self.size < 1):
            raise RecipeError(
                f"batch.size = {self.size!r} must be a whole number of at least 1, or 'full'."
            )
        if not isinstance(self.shuffle, bool):
            raise RecipeError(f"batch.shuffle = {self.shuffle!r} must be True or False.")
        if self.micro is None:
            return
        if not _is_int(self.micro) or self.micro < 1:
            raise RecipeError(f"batch.micro = {self.micro!r} must be a whole number of at least 1.")
        if self.size != "full" and self.micro > self.size:
            raise RecipeError(
                f"batch.micro = {self.micro} is larger than batch.size = {self.size}.",
                fix=f"Use at most {self.size}, or leave micro out.",
            )


@dataclass(frozen=True, slots=True)
class Validation:
    """How the model is judged.

    Args:
        source: samples that are not trained on; read in order.
        metrics: by name, besides ``loss``: a `torchmetrics.Metric`, or a function
            ``(model, data) -> f32[n]`` whose mean is taken.
        every: how often; the end of the run is always validated.
        batch: samples at once; left out, the recipe's batch size. It does not change the result.
    """

    source: Source | KeyedSource
    metrics: Mapping[str, Any] = field(default_factory=dict)
    every: DurationLike = "1ep"
    batch: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.metrics, Mapping):
            raise RecipeError("validation.metrics must be a dict of names to metrics.")
        for name, metric in self.metrics.items():
            if not callable(metric) or isinstance(metric, type):
                what = f"the class {metric.__name__}" if isinstance(metric, type) else repr(metric)
                raise RecipeError(
                    f"validation metric {name!r} is {what}.",
                    fix="Give a torchmetrics.Metric object, or a function (model, data) -> f32[n].",
                )
        if "loss" in self.metrics:
            raise RecipeError(
                "validation: the name 'loss' is taken by the objective.",
                fix="Give the metric another name.",
            )
        if self.batch is not None and (not _is_int(self.batch) or self.batch < 1):
            raise RecipeError(f"validation.batch = {self.batch!r} must be a whole number of at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training, described.

    Args:
        model: makes the model; called with Python's, numpy's and torch's generators seeded by `seed`.
        data: a source: ``len()`` and ``fetch(ids: int64[n]) -> tensors with n rows``.
        objective: ``(model, data) -> losses f32[n]``, or ``(losses f32[n], weights f32[n])``.
        optimizer: a spec such as ``SGD(lr=0.1)``, or any callable from parameter groups to a
            `torch.optim.Optimizer`.
        batch: samples per update.
        until: length of the run: updates, ``"20ep"`` or ``"1e6samples"``.
        schedule: multiplies the optimizer's rate, update by update.
        gradient: transforms, applied in order.
        groups: rules for parameters; by default biases and norms do not decay.
        validation: how the model is judged, if at all.
        early_stopping: ends the run when a validation metric stops improving.
        guard: rules that keep the run healthy.
        precision: ``"fp32"`` (the model's own dtype), ``"bf16"`` or ``"fp16"`` forward passes.
        seed: of the initial weights, the order, dropout and augmentation; 0 <= seed < 2**63.
    """

    model: Callable[[], nn.Module]
    data: Source | KeyedSource
    objective: Objective
    optimizer: OptimizerSpec | OptimizerFactory
    batch: Batch
    until: DurationLike
    schedule: Schedule = Constant()
    gradient: tuple[GradientTransform, ...] = ()
    groups: tuple[Group, ...] = ()
    validation: Validation | None = None
    early_stopping: EarlyStopping | None = None
    guard: Guard = Guard()
    precision: PrecisionName = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module) or not callable(self.model):
            raise RecipeError(
                f"model is a {type(self.model).__name__}, not a function that makes the model.",
                why="It is called after seeding, so that every start has the same weights.",
                fix="Give the function or class, or lambda: MyModel(...).",
            )
        for name, optional in (("validation", Validation), ("early_stopping", EarlyStopping)):
            if not isinstance(getattr(self, name), optional | None):
                raise RecipeError(f"{name} must be a {optional.__name__}(...), or None.")
        for name, source in self._sources().items():
            if not hasattr(source, "__len__") or not (
                hasattr(source, "fetch") or isinstance(source, KeyedSource)
            ):
                raise RecipeError(
                    f"{name} is a {type(source).__name__}, not a source.",
                    why="A source has len() and fetch(ids).",
                    fix="Wrap arrays in Arrays(x, y), a torch dataset in Dataset(dataset).",
                )
        if not callable(self.objective):
            raise RecipeError("objective must be callable: (model, data) -> losses of shape (n,).")
        if not isinstance(self.schedule, Piece | Chain):
            raise RecipeError(
                f"schedule is {self.schedule!r}.",
                fix="Join pieces: warmup('5%') >> cosine().",
            )
        transforms = self.gradient if isinstance(self.gradient, tuple | list) else [None]
        if not all(callable(t) and not isinstance(t, type) for t in transforms):
            raise RecipeError("gradient must be a tuple of transforms.", fix="(clip_norm(1.0),)")
        for name, kind in (("batch", Batch), ("guard", Guard)):
            if not isinstance(getattr(self, name), kind):
                raise RecipeError(f"{name} must be a {kind.__name__}(...).")
        rules = self.groups if isinstance(self.groups, tuple | list) else [None]
        if not all(isinstance(rule, Group) for rule in rules):
            raise RecipeError("groups must be a tuple of Group(...).", fix="(Group('*.bias'),)")
        if self.early_stopping is not None and self.validation is None:
            raise RecipeError(
                "early_stopping needs a validation.",
                why="It watches a validation metric.",
                fix="validation=Validation(source)",
            )
        if not _is_int(self.seed) or not 0 <= self.seed < 1 << 63:
            raise RecipeError(f"seed = {self.seed!r} must be a whole number from 0 to 2**63 - 1.")

    def _sources(self) -> dict[str, Any]:
        validation = {} if self.validation is None else {"validation.source": self.validation.source}
        return {"data": self.data, **validation}
