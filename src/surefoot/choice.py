"""Whether the steps of a run are compiled. Chosen once, before the first step, and kept by the run.

``compute.compile = auto`` is a rule of model, batch, length and device, never a measurement: two fresh runs
of a recipe must choose alike. `surefoot tune compute` measures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from surefoot.errors import OperationsError
from surefoot.graph import Graph
from surefoot.optim.functional import known
from surefoot.state import RunState
from surefoot.train_step import Parts, losses_of, probe, train_step
from surefoot.types import Minibatch, leaves

Compiled = Literal["step", "forward", ""]
"""What is compiled: the whole step, the forward pass and its losses, or nothing."""

ENOUGH_UPDATES = 50_000
CPP_WRAPPER_UPDATES = 200_000
_MOST_FLOPS = 20e6
_TOLERANCE = 1e-2


class Choice(NamedTuple):
    """compiled: see `Compiled`. reason: for people. graph: of the whole step, if that is it."""

    compiled: Compiled
    reason: str
    graph: Graph | None = None


class Question(NamedTuple):
    """What a choice depends on. asked: ``compute.compile``. kept: the choice of the run that is continued,
    if one is. batches: fetches the first two of the run. total: its updates. eager_every: see `Graph`.
    """

    asked: str
    kept: Compiled | None
    parts: Parts
    state: RunState
    batches: Callable[[], tuple[Minibatch, Minibatch]]
    total: int
    eager_every: int


def kept_choice(environment: Mapping[str, Any]) -> Compiled:
    """What was compiled in an environment."""
    found = environment.get("compiled")
    if found is True:  # as the first versions noted it
        return "forward"
    return found if found in ("step", "forward") else ""


def choose(q: Question) -> Choice:
    """The choice; the state is as before.

    Raises:
        OperationsError: the run was compiled as a whole, which is not possible here.
    """
    if q.asked == "off":
        return Choice("", "compute.compile = off")
    if q.asked == "auto" and q.kept is not None and q.kept != "step":
        return Choice(q.kept, "as the run began")
    if q.asked == "auto" and q.kept is None:
        against = _against(q)
        if against:
            return Choice("", against)
    why_not = refusal(q.parts)
    if not all(isinstance(leaf, Tensor) for leaf in leaves(q.batches()[0].data)):
        why_not = "batches hold more than tensors"
    if not why_not:
        begun = time.perf_counter()
        graph, why_not = _tried(q)
        if graph is not None:
            return Choice(
                "step", f"the whole step is one graph, made in {time.perf_counter() - begun:.1f} s", graph
            )
    if q.kept == "step" and q.asked == "auto":
        raise OperationsError(
            f"the steps of this run were compiled, and cannot be here: {why_not}",
            why="Compiled and not, they agree to rounding only.",
            fix="Continue it as it was, or give --compile off to go on without.",
        )
    if q.asked == "on":
        return Choice("forward", f"forward pass and losses; not the whole step: {why_not}")
    return Choice("", f"not compiled: {why_not}")


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
    return ""


def _against(q: Question) -> str:
    """What speaks against compiling by the rule, or nothing."""
    if q.parts.device.type != "cpu":
        return "not compiled: that is a rule for CPUs so far"
    if q.total < ENOUGH_UPDATES:
        return f"not compiled: under {ENOUGH_UPDATES:,} updates it does not pay"
    counter = FlopCounterMode(display=False)
    with counter:
        losses_of(q.parts, q.batches()[0])
    if counter.get_total_flops() > _MOST_FLOPS:
        return "not compiled: the model's own arithmetic dominates"
    return ""


def _tried(q: Question) -> tuple[Graph | None, str]:
    """The graph, if steps of it work and agree with those of `train_step`; else why it is of no use."""
    before = q.state.snapshot().copy()
    first, second = q.batches()
    try:
        train_step(q.parts, first, 0.0)
        expected = probe(q.parts, second)
        graph = Graph(
            q.parts, second, eager_every=q.eager_every, cpp_wrapper=q.total >= CPP_WRAPPER_UPDATES
        )
        try:
            attempt = graph(second, 0.0)
            graph(second, 0.0)
            graph(second, 0.0, check=True)
        except Exception as error:
            return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    finally:
        q.state.restore(before)
    if attempt is not None:
        found = attempt.loss.item(), attempt.grad_norm.item()
        if not all(map(_close, expected, found)):
            return None, f"loss and gradient's norm of a step are {found}, and should be {expected}"
    return graph, ""


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_TOLERANCE)
