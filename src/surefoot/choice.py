"""Whether the steps of a run are compiled. Chosen once, before the first step, and kept by the run.

``compute.compile = auto`` is a rule of model, batch, length and device, never a measurement: two fresh runs
of a recipe must choose alike. `surefoot tune compute` measures.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from surefoot.compiled import BACKWARD_HOOKS, Unchanged, forget_failed_traces, hooked
from surefoot.errors import OperationsError, SurefootError
from surefoot.graph import Graph
from surefoot.keys import word
from surefoot.optim.functional import known
from surefoot.protocols import Objective
from surefoot.state import RunState
from surefoot.train_step import Parts, losses_of, pieces_of, probe, seed_generators, train_step
from surefoot.types import Minibatch, Tree, leaves

Extent = Literal["step", "forward", ""]
"""What is compiled: the whole step, the forward pass and its losses, or nothing."""

ENOUGH_UPDATES = 50_000
CPP_WRAPPER_UPDATES = 200_000
_MOST_FLOPS = 20e6
_TOLERANCE = 1e-2
_ELSEWHERE = "the model draws from numpy's or Python's random numbers"
_FIRST = 8  # batches among which one is finite


class Choice(NamedTuple):
    """compiled: see `Extent`. reason: for people, if there is anything to tell. graph: of the whole step.
    objective: compiled, if it is that alone.
    """

    compiled: Extent
    reason: str
    graph: Graph | None = None
    objective: Objective | None = None


class Question(NamedTuple):
    """What a choice depends on. asked: ``compute.compile``. kept: the choice of the run that is continued,
    if one is. batch: fetches that of a step. total: its updates.
    """

    asked: str
    kept: Extent | None
    parts: Parts
    state: RunState
    batch: Callable[[int], Minibatch]
    total: int


def kept_choice(environment: Mapping[str, Any]) -> Extent:
    """What was compiled in an environment."""
    found = environment.get("compiled")
    if found is True:  # as the first versions noted it
        return "forward"
    return found if found in ("step", "forward") else ""


def choose(q: Question) -> Choice:
    """The choice; the state is as before.

    Raises:
        OperationsError: the run was compiled as a whole, or is to be compiled, which is not possible here.
    """
    if q.asked == "off" or (q.asked == "auto" and q.kept == ""):
        return Choice("", "")
    if q.asked == "auto" and q.kept == "forward":
        return _forward(q, "as the run began")
    if q.asked == "auto" and q.kept is None:
        against = _against(q)
        if against:
            return Choice("", f"not compiled: {against}")
    begun = time.perf_counter()
    why_not, graph = refusal(q.parts), None
    if not all(isinstance(leaf, Tensor) for leaf in leaves(q.batch(0).data)):
        why_not = "batches hold more than tensors"
    if not why_not:
        graph, why_not = _tried(q)
    if graph is not None:
        took = f"{time.perf_counter() - begun:.1f} s"
        return Choice("step", f"compiled: the whole step is one function, made in {took}", graph)
    if q.kept == "step" and q.asked == "auto":
        raise OperationsError(
            f"the steps of this run were compiled, and cannot be here: {why_not}",
            why="Compiled and not, they agree to rounding only.",
            fix="Continue it as it was; or go on without, equal to rounding: --compile off, or --set "
            "compute.compile=off.",
        )
    if q.asked == "on" and why_not != _ELSEWHERE:
        return _forward(q, f"not the whole step: {why_not}")
    return Choice("", f"not compiled: {why_not}")


def _forward(q: Question, why: str) -> Choice:
    """Forward pass and losses alone, if a batch goes through, and back."""

    def forward(model: nn.Module, data: Tree) -> Tensor | tuple[Tensor, Tensor]:
        return q.parts.objective(model, data)

    options: Any = {"fallback_random": True}  # the masks that eager mode draws
    objective: Objective = torch.compile(forward, dynamic=False, options=options)
    try:
        probe(replace(q.parts, objective=objective), q.batch(0))
    except SurefootError:
        raise
    except Exception as error:
        forget_failed_traces()
        raise OperationsError(
            f"compute.compile = {q.asked}: nothing can be compiled here: {_first_line(error)}",
            why=why,
            fix="torch.compile needs a C++ compiler on a CPU (g++); or go on without, equal to rounding: "
            "--compile off, or --set compute.compile=off.",
        ) from error
    return Choice("forward", f"compiled: forward pass and losses; {why}", objective=objective)


def refusal(parts: Parts) -> str:
    """Why no graph of the whole step is possible, or nothing."""
    optimizer = parts.updater.optimizer
    if parts.device.type != "cpu":
        return f"that is for CPUs so far, and this is {parts.device}"
    if not known(optimizer) or not parts.updater.well_known:
        return f"optimizer {type(optimizer).__name__} is none of torch's own, or hooked into, or has no eps"
    if parts.physical < parts.micro:
        return "compute.micro_batch splits the recipe's micro-batches"
    if any(p.is_complex() or p.is_sparse for p in parts.params):
        return "the model has complex or sparse parameters"
    if any(isinstance(m, torch.jit.ScriptModule) for m in parts.model.modules()):
        return "the model has TorchScript in it"
    if any(map(hooked, parts.params)):
        return "something is hooked to a parameter's gradient"
    if any(getattr(m, hooks) for m in parts.model.modules() for hooks in BACKWARD_HOOKS):
        return "something is hooked to the backward pass of a module"
    return ""


def _against(q: Question) -> str:
    """What speaks against compiling by the rule, or nothing."""
    if q.parts.device.type != "cpu":
        return "auto is a rule for CPUs so far"
    if q.total < ENOUGH_UPDATES:
        return f"under {ENOUGH_UPDATES:,} updates it does not pay"
    counter = _Flops()
    try:
        with counter:
            losses_of(q.parts, q.batch(0))
    except SurefootError:
        raise
    except Exception as error:  # if it is the model's, the first step will tell
        q.parts.buffers.settle(torch.tensor(False), on_host=True)
        forget_failed_traces()
        return f"its operations cannot be counted: {_first_line(error)}"
    return "the model's own arithmetic dominates" if counter.total > _MOST_FLOPS else ""


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations by torch's table. Torch's own counter hooks into autograd to tell
    modules apart, and so fails where a forward pass takes a derivative, as a gradient penalty does.
    """

    supports_higher_order_operators = True  # that is, it is asked about them

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if isinstance(func, HigherOrderOperator):
            raise NotImplementedError(f"what torch does in {func}")
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def _tried(q: Question) -> tuple[Graph | None, str]:
    """The graph, if steps of it work and agree with those of `train_step`; else why it is of no use."""
    parts, before = q.parts, q.state.snapshot().copy()
    unchanged = Unchanged(parts.model, [parts.objective, *parts.transforms])
    try:
        train_step(parts, q.batch(0), 0.0)
        if not unchanged():
            return None, "the model, the objective or a transform changes its attributes in a step"
        if _draws_elsewhere(parts, q.batch(0)):
            return None, _ELSEWHERE
        for step in range(1, _FIRST):
            batch = q.batch(step)
            expected = probe(parts, batch)
            if all(map(math.isfinite, expected)):
                break
        graph = Graph(parts, batch, cpp_wrapper=q.total >= CPP_WRAPPER_UPDATES)
        try:
            attempts = [graph(batch, 0.0), graph(batch, 0.0), graph(batch, 0.0, check=True)]
        except Exception as error:
            forget_failed_traces()
            return None, _first_line(error)
    finally:
        q.state.restore(before)
    for attempt in attempts:
        if attempt is None:
            return None, "the first batches are not as usual"
        found = attempt.loss.item(), attempt.grad_norm.item()
        if not all(map(_close, expected, found)):
            numbers = "loss {:.6g} and gradient norm {:.6g}".format
            return None, f"a compiled step has {numbers(*found)}, an eager one {numbers(*expected)}"
    return graph, ""


def _draws_elsewhere(parts: Parts, batch: Minibatch) -> bool:
    """Whether a forward pass draws random numbers that are not torch's."""
    losses_of(parts, batch)
    drawn = random.random(), np.random.random()
    *_, last = pieces_of(parts, batch)
    seed_generators(word(word(parts.draws, batch.slots.step), last.micro), parts.device)
    return drawn != (random.random(), np.random.random())


def _first_line(error: Exception) -> str:
    cause = getattr(error, "inner_exception", None) or error  # torch wraps what happens in a compiler
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or ['?'])[0]}"


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_TOLERANCE)
