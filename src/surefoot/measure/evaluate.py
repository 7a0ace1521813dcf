"""Validation: the loss and metrics over a whole source, exactly weighted, leaving no trace."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.errors import RecipeError
from surefoot.protocols import Objective
from surefoot.types import Minibatch, Tree

Batches = Callable[[], Generator[Minibatch, None, None]]


@dataclass(frozen=True)
class Evaluation:
    """Evaluates a model on a source.

    Args:
        objective: gives the metric ``loss``.
        metrics: by name: a `torchmetrics.Metric`, updated with ``model(inputs)`` and the targets of
            data that is ``(inputs, targets)``; or a function ``(model, data) -> values f32[n]``, whose
            mean over samples is taken, or ``-> (values f32[n], weights f32[n])`` for a weighted mean.
        batches: all batches of the source, in order.
        forward: the precision's context for a forward pass.
        seed: seeds torch's generators, alike before each evaluation.
    """

    objective: Objective
    metrics: Mapping[str, Any]
    batches: Batches
    forward: Callable[[], AbstractContextManager[Any]]
    seed: Callable[[], None]

    def __call__(
        self, model: nn.Module, *, stop: Callable[[], bool] = lambda: False, most: int | None = None
    ) -> dict[str, float] | None:
        """Metrics by name, or None if `stop` said so between two batches.

        Args:
            most: look at that many batches only.

        The model is in eval mode meanwhile, and each module's own mode is put back. Metrics that are
        functions share one forward pass with the loss as long as they call the model alike.
        """
        sums: dict[str, Mean] = {"loss": Mean()}
        counters = {name: metric for name, metric in self.metrics.items() if _is_counter(metric)}
        for metric in counters.values():
            metric.reset()
        self.seed()
        with _evaluating(model) as forget, torch.no_grad(), closing(self.batches()) as batches:
            for index, batch in enumerate(batches):
                if stop():
                    return None
                if most is not None and index >= most:
                    break
                forget()
                with self.forward():
                    sums["loss"].add("loss", self.objective(model, batch.data), batch)
                    for name, metric in self.metrics.items():
                        if name in counters:
                            _count(name, metric, model, batch.data)
                        else:
                            sums.setdefault(name, Mean()).add(name, metric(model, batch.data), batch)
        means = {name: mean.value() for name, mean in sums.items()}
        for name, metric in counters.items():
            means.update(_computed(name, metric))
        return means


class Mean:
    """A weighted mean in float64."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._weight: Tensor | float = 0.0

    def add(self, name: str, values: Tensor | tuple[Tensor, Tensor], batch: Minibatch) -> None:
        """Takes values f32[n], or (values f32[n], weights f32[n]), of a batch of n rows."""
        each, weights = values if isinstance(values, tuple) else (values, None)
        if not isinstance(each, Tensor) or each.shape != (batch.num_rows,):
            got = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise RecipeError(
                f"validation metric {name!r} returned {got} for a batch of {batch.num_rows}.",
                why="Its mean is taken over samples, exactly, whatever the batch size.",
                fix=f"Return one value per sample, of shape ({batch.num_rows},).",
            )
        each = each.double()
        if weights is None:
            self._sum, self._weight = self._sum + each.sum(), self._weight + batch.num_rows
        else:
            self._sum = self._sum + (each * weights).sum()
            self._weight = self._weight + weights.sum()

    def value(self) -> float:
        """The mean; not a number if nothing has weight."""
        weight = float(self._weight)
        return float(self._sum) / weight if weight else float("nan")


def _is_counter(metric: Any) -> bool:
    """Whether it is a `torchmetrics.Metric`, told without importing torchmetrics."""
    return all(hasattr(metric, method) for method in ("update", "compute", "reset"))


def _count(name: str, metric: Any, model: nn.Module, data: Tree) -> None:
    if not (isinstance(data, tuple | list) and len(data) == 2):
        raise RecipeError(
            f"validation metric {name!r} needs data that is (inputs, targets).",
            fix="Use a function (model, data) -> values of shape (n,).",
        )
    outputs = model(data[0])
    if hasattr(metric, "to"):
        metric.to(outputs.device)
    metric.update(outputs, data[1])


def _computed(name: str, metric: Any) -> dict[str, float]:
    value = metric.compute()
    parts = {f"{name}_{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    for part, number in parts.items():
        if isinstance(number, Tensor) and number.numel() != 1:
            raise RecipeError(
                f"validation metric {part!r} computed {tuple(number.shape)} values, not one.",
                fix="Average it: torchmetrics has average='macro' and the like.",
            )
    return {part: float(number) for part, number in parts.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Eval mode, with ``model(...)`` computed once per batch for the same arguments.

    Yields a function that forgets the batch. Modules go back to the mode each was in: a model with
    frozen batch norm keeps it frozen.
    """
    modes = [(module, module.training) for module in model.modules()]
    last: list[tuple[tuple[Any, ...], Any]] = []
    forward = model.forward

    def once(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            return forward(*args, **kwargs)
        for known, outputs in last:
            if len(known) == len(args) and all(a is b for a, b in zip(known, args, strict=True)):
                return outputs
        last.append((args, forward(*args)))
        return last[-1][1]

    model.eval()
    model.forward = once
    try:
        yield last.clear
    finally:
        del model.forward  # the class's own again
        if model.forward != forward:  # it was set on the instance before
            model.forward = forward
        for module, mode in modes:
            module.training = mode
