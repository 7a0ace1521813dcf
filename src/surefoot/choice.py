"""Whether the steps of a run are compiled. Chosen once, before the first step, and kept by the run.

``compute.compile = auto`` is a rule of model, batch, length and device, never a measurement: two fresh runs
of a recipe must choose alike. `surefoot tune compute` measures. On a GPU steps are captured where that is
possible, which changes no bit of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from surefoot.captured import Captured
from surefoot.compiled import forget_failed_traces, with_own_code
from surefoot.errors import OperationsError, SurefootError
from surefoot.graph import Graph, form
from surefoot.protocols import Objective
from surefoot.train_step import losses_of, pieces_of, probe
from surefoot.trials import (
    ELSEWHERE,
    Trial,
    captured_step,
    compiled_step,
    first_line,
    refusal,
)
from surefoot.types import Tree, leaves

Extent = Literal["step", "forward", "captured", ""]
"""What is compiled: the whole step, the forward pass and its losses, or nothing. Captured: nothing, but the
step is a CUDA graph, as it may be with a compiled forward pass.
"""

ENOUGH_UPDATES = 50_000
_MOST_FLOPS = 20e6


class Choice(NamedTuple):
    """compiled: see `Extent`. reason: for people, if there is anything to tell. graph: of the whole step.
    objective: compiled, if it is that alone.
    """

    compiled: Extent
    reason: str
    graph: Graph | Captured | None = None
    objective: Objective | None = None


class Question(NamedTuple):
    """What a choice depends on. asked: ``compute.compile``. kept: the choice of the run that is continued,
    if one is.
    """

    asked: str
    kept: Extent | None
    trial: Trial


def kept_choice(environment: Mapping[str, Any]) -> Extent:
    """What was compiled in an environment."""
    found = environment.get("compiled")
    if found is True:  # as the first versions noted it
        return "forward"
    return found if found in ("step", "forward", "captured") else ""


def choose(q: Question) -> Choice:
    """The choice; the state is as before.

    Raises:
        OperationsError: the run was compiled as a whole, or is to be compiled, which is not possible here.
    """
    if q.asked == "off":
        return Choice("", "")
    if q.trial.parts.device.type == "cuda":
        return _on_gpu(q)
    if q.asked == "auto" and q.kept in ("", "captured"):
        return Choice("", "")
    if q.asked == "auto" and q.kept == "forward":
        return _forward(q, "as the run began")
    if q.asked == "auto" and q.kept is None:
        against = _against(q)
        if against:
            return Choice("", f"not compiled: {against}")
    begun = time.perf_counter()
    why_not, graph = refusal(q.trial.parts), None
    if not all(isinstance(leaf, Tensor) for leaf in leaves(q.trial.batch(0).data)):
        why_not = "batches hold more than tensors"
    if not why_not:
        graph, why_not = compiled_step(q.trial)
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
    if q.asked == "on" and why_not != ELSEWHERE:
        return _forward(q, f"not the whole step: {why_not}")
    return Choice("", f"not compiled: {why_not}")


def _on_gpu(q: Question) -> Choice:
    """A step that is captured if that is possible, with a forward pass that is compiled if asked for."""
    choice, told = Choice("", ""), []
    if q.asked == "on" or q.kept == "forward":
        choice = _forward(q, "")
        told.append(choice.reason)
    begun = time.perf_counter()
    parts = q.trial.parts
    if choice.objective is not None:
        parts = replace(parts, objective=choice.objective)
    graph, why_not = captured_step(q.trial._replace(parts=parts))
    if graph is None:
        told.append(f"not captured: {why_not}")
    else:
        told.append(f"captured: the step is one CUDA graph, made in {time.perf_counter() - begun:.1f} s")
    extent: Extent = choice.compiled or ("" if graph is None else "captured")
    return choice._replace(compiled=extent, reason="; ".join(told), graph=graph)


def _forward(q: Question, why: str) -> Choice:
    """Forward pass and losses alone, if a batch goes through, and back. Batches of another form than the
    first are left to the objective: torch compiles for eight, counted from where a run goes on.
    """
    eager, batch = q.trial.parts.objective, q.trial.batch(0)
    usual = {form(piece.data, leaves(piece.data)) for piece in pieces_of(q.trial.parts, batch)}

    def forward(model: nn.Module, data: Tree) -> Tensor | tuple[Tensor, Tensor]:
        return eager(model, data)

    options: Any = {"fallback_random": True}  # the masks that eager mode draws
    compiled: Any = torch.compile(
        with_own_code(cast(FunctionType, forward)), dynamic=False, options=options
    )

    def objective(model: nn.Module, data: Tree) -> Tensor | tuple[Tensor, Tensor]:
        found: Tensor | tuple[Tensor, Tensor]
        found = (compiled if form(data, leaves(data)) in usual else eager)(model, data)
        return found

    try:
        probe(replace(q.trial.parts, objective=objective), batch)
    except SurefootError:
        raise
    except Exception as error:
        forget_failed_traces()
        raise OperationsError(
            f"compute.compile = {q.asked}: nothing can be compiled here: {first_line(error)}",
            why=why,
            fix="torch.compile needs a C++ compiler on a CPU (g++); or go on without, equal to rounding: "
            "--compile off, or --set compute.compile=off.",
        ) from error
    reason = "compiled: forward pass and losses" + (why and f"; {why}")
    return Choice("forward", reason, objective=objective)


def _against(q: Question) -> str:
    """What speaks against compiling by the rule, or nothing."""
    if q.trial.total < ENOUGH_UPDATES:
        return f"under {ENOUGH_UPDATES:,} updates it does not pay"
    counter = _Flops()
    try:
        with counter:
            losses_of(q.trial.parts, q.trial.batch(0))
    except SurefootError:
        raise
    except Exception as error:  # if it is the model's, the first step will tell
        q.trial.parts.buffers.settle(torch.tensor(False), on_host=True)
        forget_failed_traces()
        return f"its operations cannot be counted: {first_line(error)}"
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
