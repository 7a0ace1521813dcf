"""Torch's optimizers without torch's compiler. Some of their methods, and their step, import it when they
are first called, to keep it out of them: more than a second of each start (benchmarks/start.py).
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
            delattr(method, _MARK)


def bare_step(optimizer: Optimizer) -> Callable[[Optimizer], Any] | None:
    """The step of one of torch's own optimizers, without what torch puts around it: a mark for its
    profiler, which is 5 % of the step of a small network, and a hint for the compiler. None where that is
    not found as it is in torch 2.13.
    """
    marked = type(optimizer).step
    hinted = getattr(marked, "__wrapped__", None) if getattr(marked, "hooked", False) else None
    step = getattr(hinted, "__wrapped__", None)
    if step is None or any(group.get("differentiable") for group in optimizer.param_groups):
        return hinted

    def bare(optimizer: Optimizer) -> None:
        with torch.no_grad():
            step(optimizer)

    return bare
