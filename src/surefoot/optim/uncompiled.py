"""Torch's optimizers without torch's compiler. Some of their methods, and their step, import it when they
are first called, to keep it out of them: a good part of a start (docs/performance.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

_METHODS = ("add_param_group", "state_dict", "load_state_dict")
_MARK = "__dynamo_disable"
"""Where torch 2.13 keeps what it calls in place of such a method: see `torch._compile._disable_dynamo`."""


@contextmanager
def without_compiler() -> Iterator[None]:
    """Within it, methods of optimizers do not import the compiler, unless it is imported already: there is
    nothing to be kept out of them before.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    methods = [getattr(vars(Optimizer)[name], "__wrapped__", None) for name in _METHODS]
    plain = [method for method in methods if method is not None and not hasattr(method, _MARK)]
    for method in plain:
        setattr(method, _MARK, method)
    try:
        yield
    finally:
        for method in plain:
            if vars(method).get(_MARK) is method:
                vars(method).pop(_MARK, None)  # another thread may have taken it off


def bare_step(optimizer: Optimizer) -> Callable[[Optimizer], Any] | None:
    """The step of one of torch's own optimizers, without what torch puts around it: a mark for its
    profiler, and a hint for the compiler. None where it is not found as it is in torch 2.13, where somebody
    has put another in its place, or where it is to be differentiated.
    """
    layers = step_layers(optimizer)
    if len(layers) != 3 or any(group.get("differentiable") for group in optimizer.param_groups):
        return None
    step = layers[-1]

    def bare(optimizer: Optimizer) -> None:
        with torch.no_grad():
            step(optimizer)

    return bare


def step_layers(optimizer: Optimizer) -> list[Callable[..., Any]]:
    """The step of one of torch's own optimizers in its wrappers, the outermost first; none if any of them
    is not torch's.
    """
    kind = type(optimizer)
    torchs = {sys.modules[cls.__module__].__file__ for cls in kind.__mro__ if issubclass(cls, Optimizer)}
    layers: list[Any] = [kind.step]
    while hasattr(layers[-1], "__wrapped__"):
        layers.append(layers[-1].__wrapped__)
    codes = [getattr(layer, "__code__", None) for layer in layers]
    return layers if all(code is not None and code.co_filename in torchs for code in codes) else []
