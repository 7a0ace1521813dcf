"""Whether the steps of a run are compiled. Chosen once, before the first step, and kept by the run.

``compute.compile = auto`` is a rule of model, batch, length and device, never a measurement: two fresh runs
of a recipe must choose alike. So is how many threads the kernels of a compiled step have, where
``compute.threads`` does not say. `surefoot tune compute` measures. On a GPU, where captured steps have the
bits of eager ones, what a step takes of its memory counts, too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from types import FunctionType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from surefoot.captured import Captured
from surefoot.compiled import forget_failed_traces, with_own_code
from surefoot.errors import OperationsError, SurefootError
from surefoot.graph import Graph, form
from surefoot.parallel.device import set_threads
from surefoot.passes import probe
from surefoot.protocols import Objective
from surefoot.train_step import pieces_of
from surefoot.trials import (
    ELSEWHERE,
    Trial,
    captured_step,
    compiled_step,
    first_line,
    refusal,
)
from surefoot.types import Tree, leaves
from surefoot.work import count

Extent = Literal["step", "forward", "captured", ""]
"""What is compiled: the whole step, the forward pass and its losses, or nothing; captured: nothing, but the
step is a CUDA graph.
"""

ENOUGH_UPDATES = 50_000
_MOST_FLOPS = 20e6
SHORT, SMALL = 1 << 21, 1 << 16
"""Floating-point operations of a kernel, and elements of a tensor, or weights, that one thread is done with
before a second one has been of use (`benchmarks/threads.py`).
"""
ENOUGH_TO_CAPTURE = 1_000
MOST_MEMORY = 0.4
"""Of a GPU's, that may be in use in a step, eager or as it is captured, where that is done by the rule: a
graph has memory of its own for all that is between its kernels, beside that of the eager steps that come
now and then.
"""
_ENOUGH_BATCHES = 6
"""For torch to have compiled all that the first of them need, if they are alike."""


class Choice(NamedTuple):
    """compiled: see `Extent`. reason: for people, if there is anything to tell. graph: of the whole step.
    objective: compiled, if it is that alone.
    """

    compiled: Extent
    reason: str
    graph: Graph | Captured | None = None
    objective: Objective | None = None


class Kept(NamedTuple):
    """How a run was computed that is continued or replayed."""

    compiled: Extent
    threads: int | None


class Question(NamedTuple):
    """What a choice depends on. asked, threads: of ``compute``. say: is told of what takes a while."""

    asked: str
    threads: int | None
    kept: Kept | None
    trial: Trial
    say: Callable[[str], object] = lambda text: None

    @property
    def before(self) -> Extent | None:
        """What the run that is continued has compiled, if one is, and by the rule goes on with."""
        return self.kept.compiled if self.asked == "auto" and self.kept is not None else None

    @property
    def by_rule(self) -> bool:
        """Whether nobody has chosen."""
        return self.asked == "auto" and self.kept is None


def kept_choice(environment: Mapping[str, Any]) -> Kept:
    """How steps were computed in an environment."""
    found, threads = environment.get("compiled"), environment.get("threads")
    if found is True:  # as the first versions noted it
        return Kept("forward", threads)
    return Kept(found if found in ("step", "forward", "captured") else "", threads)


def choose(q: Question) -> Choice:
    """The choice; the state is as before.

    Raises:
        OperationsError: the run was compiled as a whole, or is to be compiled, which is not possible here.
    """
    if q.asked == "off":
        return Choice("", "")
    if q.trial.parts.device.type == "cuda":
        return _on_gpu(q)
    if q.before in ("", "captured"):
        return Choice("", "")
    if q.before == "forward":
        return _forward(q, "as the run began")
    if q.by_rule:
        against = _against(q)
        if against:
            return Choice("", f"not compiled: {against}")
    begun = time.perf_counter()
    why_not, graph = refusal(q.trial.parts), None
    if not all(isinstance(leaf, Tensor) for leaf in leaves(q.trial.batch(0).data)):
        why_not = "batches hold more than tensors"
    before, few = torch.get_num_threads(), ""
    if not why_not:
        threads, few = _threads(q)
        set_threads(threads)
        q.say("compiling the whole step, before the first; --compile off does without")
        graph, why_not = compiled_step(q.trial)
    if graph is not None:
        took = f"{time.perf_counter() - begun:.1f} s"
        return Choice("step", f"compiled: the whole step is one function, made in {took}{few}", graph)
    set_threads(before)
    if q.before == "step":
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
    """A step that is captured, by the rule or if that is asked for; else, if asked for, a compiled forward
    pass.
    """
    if q.before == "":
        return Choice("", "")
    if q.before == "forward":
        return _forward(q, "as the run began")
    if q.by_rule and q.trial.total < ENOUGH_TO_CAPTURE:
        return Choice("", f"not captured: under {ENOUGH_TO_CAPTURE:,} updates it does not pay")
    begun, device = time.perf_counter(), q.trial.parts.device
    torch.cuda.reset_peak_memory_stats(device)
    graph, why_not = captured_step(q.trial)
    if graph is not None and q.by_rule:
        all_of_it: int = torch.cuda.get_device_properties(device).total_memory
        if torch.cuda.max_memory_allocated(device) > MOST_MEMORY * all_of_it:
            graph, why_not = None, f"a step takes more than {MOST_MEMORY:.0%} of the GPU's memory"
    if graph is not None:
        took = f"{time.perf_counter() - begun:.1f} s"
        return Choice("captured", f"captured: the step is one CUDA graph, made in {took}", graph)
    if q.asked == "auto":
        return Choice("", f"not captured: {why_not}")
    return _forward(q, f"not captured: {why_not}")


def _forward(q: Question, why: str) -> Choice:
    """Forward pass and losses alone, if batches go through, and back. Torch compiles a function eight
    times, counted from where a run goes on, and then calls it as it is: so batches of another form than the
    first are left to the objective, and one that would be compiled anew for each batch is not compiled.
    """
    q.say("compiling forward pass and losses, before the first step; --compile off does without")
    eager, first = q.trial.parts.objective, q.trial.batch(0)
    usual = {form(piece.data, leaves(piece.data)) for piece in pieces_of(q.trial.parts, first)}

    def forward(model: nn.Module, data: Tree) -> Tensor | tuple[Tensor, Tensor]:
        return eager(model, data)

    own = with_own_code(cast(FunctionType, forward))
    options: Any = {"fallback_random": True}  # the masks that eager mode draws
    compiled: Any = torch.compile(own, dynamic=False, options=options)

    def objective(model: nn.Module, data: Tree) -> Tensor | tuple[Tensor, Tensor]:
        chosen: Objective = compiled if form(data, leaves(data)) in usual else eager
        return chosen(model, data)

    parts = replace(q.trial.parts, objective=objective)
    try:
        nums = []
        for step in range(min(_ENOUGH_BATCHES, q.trial.total)):
            probe(parts, q.trial.batch(step))
            nums.append(_num_compiled())
    except SurefootError:
        raise
    except Exception as error:
        forget_failed_traces()
        what = "compute.compile = on: nothing can be compiled here"
        if q.asked == "auto":  # an attempt before has done so
            what = "the forward pass of this run was compiled, and cannot be here"
            why = "Compiled and not, they agree to rounding only."
        text = first_line(error)
        raise OperationsError(
            f"{what}: {text}",
            why="" if text in why else why,
            fix="torch.compile needs a C++ compiler on a CPU (g++); or go on without, equal to rounding: "
            "--compile off, or --set compute.compile=off.",
        ) from error
    if len(nums) > 3 and all(now > before for before, now in pairwise(nums[-4:])):
        return Choice("", f"not compiled: {why}; the forward pass would be compiled anew in each step")
    return Choice("forward", f"compiled: forward pass and losses; {why}", objective=objective)


def _num_compiled() -> int:
    """Graphs that torch has compiled in this process."""
    return int(sys.modules["torch._dynamo"].utils.counters["stats"]["unique_graphs"])


def _against(q: Question) -> str:
    """What speaks against compiling by the rule, or nothing."""
    if q.trial.total < ENOUGH_UPDATES:
        return f"under {ENOUGH_UPDATES:,} updates it does not pay"
    counted = count(q.trial)
    if isinstance(counted, str):
        return f"its operations cannot be counted: {counted}"
    return "the model's own arithmetic dominates" if counted.total > _MOST_FLOPS else ""


def _threads(q: Question) -> tuple[int, str]:
    """For the kernels of a compiled step, on a CPU; and why. For short ones a second thread takes longer to
    wake than it saves, and with one the rest of the step is done meanwhile (`surefoot.laps`).
    """
    now = torch.get_num_threads()
    if q.threads is not None or now == 1:
        return now, ""
    if q.kept is not None and q.kept.compiled == "step":
        return (1, ", for one thread, as the run began") if q.kept.threads == 1 else (now, "")
    work, weights = count(q.trial), sum(p.numel() for p in q.trial.parts.params)
    if isinstance(work, str) or work.most > SHORT or max(work.elements, weights) > SMALL:
        return now, ""
    return 1, ", for one thread: its kernels are short"
