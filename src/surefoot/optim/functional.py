"""Updates of torch's own optimizers as functions of tensors, for a step that is compiled whole.

Torch's optimizer classes cannot be traced together with the pass that makes the gradients; the functions
below them can.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adadelta import adadelta
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.nadam import nadam
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

from surefoot.optim.uncompiled import step_layers

_ADAM = (adam, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"))
FUNCTIONS: dict[type[Optimizer], tuple[Callable[..., None], tuple[str, ...]]] = {
    torch.optim.SGD: (sgd, ("momentum_buffer",)),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: (nadam, ("exp_avg", "exp_avg_sq", "mu_product", "step")),
    torch.optim.RMSprop: (rmsprop, ("square_avg", "grad_avg", "momentum_buffer", "step")),
    torch.optim.Adagrad: (adagrad, ("sum", "step")),
    torch.optim.Adadelta: (adadelta, ("square_avg", "acc_delta", "step")),
}
"""The function of each class, and the names of what it keeps per parameter, in the function's order."""

Slots = list[list[list[Tensor | None]]]
"""What an optimizer keeps: by group, by name, by parameter."""


class FunctionalUpdate:
    """The update of an optimizer that is one of torch's own, and has taken a step.

    Args:
        optimizer: the class itself, not one derived from it, without hooks: see `known`.
        trained: those of its parameters that get gradients.
    """

    def __init__(self, optimizer: Optimizer, trained: Sequence[Tensor]) -> None:
        self._optimizer = optimizer
        self._function, self._names = FUNCTIONS[type(optimizer)]
        places = {id(p): i for i, p in enumerate(trained)}
        self._groups = [[p for p in group["params"] if id(p) in places] for group in optimizer.param_groups]
        self._places = [[places[id(p)] for p in group] for group in self._groups]
        traced = {"foreach": True, "capturable": True}  # or a rate could not be a tensor
        names = _parameters(self._function)
        how = {name: value for name, value in traced.items() if name in names}
        self._settings = [keywords(self._function, group) | how for group in optimizer.param_groups]
        self._takes_none = self._function is sgd
        self._slots, self._of = self._kept(), optimizer.state

    def slots(self) -> Slots | None:
        """What the optimizer keeps now; None while it lacks any that it had when this was made, as before
        its first update. Loading a state replaces it.
        """
        if self._of is not self._optimizer.state:
            found = self._kept()
            if [*map(_is_there, found)] != [*map(_is_there, self._slots)]:
                return None
            self._slots, self._of = found, self._optimizer.state
        return self._slots

    def _kept(self) -> Slots:
        state = self._optimizer.state
        return [[[state.get(p, {}).get(n) for p in group] for n in self._names] for group in self._groups]

    def __call__(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], slots: Slots, rates: Tensor
    ) -> None:
        """Updates `params` and `slots` in place, at ``rates[group]``; may be traced."""
        for group, places in enumerate(self._places):
            if not places:
                continue
            lists = [[] if kept[0] is None and not self._takes_none else kept for kept in slots[group]]
            mine, theirs = [params[i] for i in places], [grads[i] for i in places]
            self._function(mine, theirs, *lists, lr=rates[group], **self._settings[group])


def _is_there(kept: list[list[Tensor | None]]) -> list[list[bool]]:
    return [[one is not None for one in of_name] for of_name in kept]


def known(optimizer: Optimizer) -> bool:
    """Whether there is a function for it."""
    if type(optimizer) not in FUNCTIONS:
        return False
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    own = "step" in vars(optimizer) or not step_layers(optimizer)
    return not own and not hooks


_FIXED = {
    "fused": False,
    "differentiable": False,
    "has_sparse_grad": False,
    "has_complex": False,
    "grad_scale": None,
    "found_inf": None,
}


def keywords(function: Callable[..., None], group: dict[str, Any]) -> dict[str, Any]:
    """A group's options as keywords of the function, but for the rate."""
    takes = _parameters(function)
    settings = {k: v for k, v in group.items() if k in takes}
    if "betas" in group:
        settings["beta1"], settings["beta2"] = group["betas"]
    return settings | {name: value for name, value in _FIXED.items() if name in takes}


@functools.cache
def _parameters(function: Callable[..., None]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters) - {"params", "lr"}
