"""Objectives from loss functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surefoot.errors import RecipeError
from surefoot.types import Tree

LossFunction = Callable[..., Tensor]


def supervised(function: LossFunction, **options: Any) -> Supervised:
    """The objective of a torch functional loss, for data that is ``(inputs, targets)``.

    The loss of a sample is the mean over its own elements. With `cross_entropy` and `nll_loss`, if
    ``weight`` or ``ignore_index`` is given or a sample has several targets, samples are weighted as
    torch's ``reduction="mean"`` weights them: by class weight, ignored targets left out.

    Args:
        function: a loss with a ``reduction`` argument, such as ``F.cross_entropy``.
        options: passed on to it, such as ``label_smoothing=0.1``.

    Raises:
        RecipeError: the loss takes no ``reduction``, or ``reduction`` is among the options.
    """
    if not callable(function):
        raise RecipeError(f"supervised({function!r}) needs a loss function.", fix="F.cross_entropy")
    if "reduction" in options or "reduction" not in inspect.signature(function).parameters:
        raise RecipeError(
            f"supervised({getattr(function, '__name__', function)}) cannot choose the reduction.",
            why="Losses are per sample here; surefoot takes the mean, whatever the micro-batch.",
            fix="Give a loss function with a reduction argument, and do not set it; or write an "
            "objective: (model, data) -> losses of shape (n,).",
        )
    return (ClassWeighted if function in (F.cross_entropy, F.nll_loss) else Supervised)(function, options)


class Supervised:
    """``data = (inputs, targets)``; losses of ``model(inputs)`` against targets, one per sample."""

    def __init__(self, function: LossFunction, options: dict[str, Any]) -> None:
        self.function, self.options = function, options

    def __call__(self, model: nn.Module, data: Tree) -> Tensor | tuple[Tensor, Tensor]:
        """Losses f32[n]."""
        inputs, targets = _pair(data)
        losses = self._elements(model, inputs, targets)
        return losses if losses.ndim == 1 else losses.flatten(1).mean(1)

    def _elements(self, model: nn.Module, inputs: Tree, targets: Tensor) -> Tensor:
        return self.function(model(inputs), targets, reduction="none", **self.options)


class ClassWeighted(Supervised):
    """Losses over classes, where the mean is over targets that count."""

    def __call__(self, model: nn.Module, data: Tree) -> Tensor | tuple[Tensor, Tensor]:
        """Losses f32[n], with weights f32[n] where not all are 1."""
        inputs, targets = _pair(data)
        if not self._uneven(targets):
            return self._elements(model, inputs, targets)
        weights = self._weigh(targets)
        losses = self._elements(model, inputs, targets)
        sums = losses if losses.ndim == 1 else losses.flatten(1).sum(1)
        return sums / torch.where(weights > 0, weights, 1), weights

    def weigh(self, data: Tree) -> Tensor | None:
        """Weights f32[n]: the class weights of the targets that are not ignored, summed. None: all 1."""
        _, targets = _pair(data)
        return self._weigh(targets) if self._uneven(targets) else None

    def _uneven(self, targets: Tensor) -> bool:
        if targets.ndim == 1 and "weight" not in self.options and "ignore_index" not in self.options:
            return False
        return not targets.is_floating_point()  # of class probabilities torch takes a plain mean

    def _weigh(self, targets: Tensor) -> Tensor:
        ignored = targets == self.options.get("ignore_index", -100)
        weight = self.options.get("weight")
        if weight is None:
            each = torch.ones_like(targets, dtype=torch.float32)
        else:
            each = weight.to(targets.device)[targets.masked_fill(ignored, 0)]
        return (
            each.masked_fill(ignored, 0.0).flatten(1).sum(1)
            if targets.ndim > 1
            else (each.masked_fill(ignored, 0.0))
        )


def _pair(data: Tree) -> tuple[Tree, Tensor]:
    if isinstance(data, tuple | list) and len(data) == 2:
        return data[0], data[1]
    raise RecipeError(
        f"supervised(...) needs data that is (inputs, targets); the source gave {type(data).__name__}"
        + (f" of {len(data)}" if isinstance(data, tuple | list | dict) else "")
        + ".",
        fix="Use Arrays(inputs, targets), or write an objective: (model, data) -> losses (n,).",
    )
