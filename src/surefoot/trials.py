"""Whether a graph of the whole step works here: tried on the first batches, compared with `train_step`."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from surefoot.captured import Captured
from surefoot.compiled import forget_failed_traces
from surefoot.errors import SurefootError
from surefoot.graph import Graph
from surefoot.keys import seed_of
from surefoot.optim.functional import known
from surefoot.passes import losses_of, probe
from surefoot.state import RunState
from surefoot.train_step import Parts, pieces_of, train_step
from surefoot.types import Minibatch, leaves
from surefoot.unchanged import BACKWARD_HOOKS, HOOKS, Unchanged, hooked

ELSEWHERE = "the model draws from numpy's or Python's random numbers"
_TOLERANCE = 1e-2  # of other kernels
_REPEATS = 1e-5  # of the same ones, of which some may not repeat to the bit
_MOST_TRIED = 8
"""Batches among which a finite one is looked for."""
_MOST_HALVED = 32
"""Tries of a step: each that overflows halves the loss scale."""


class Trial(NamedTuple):
    """What is tried: steps of these parts. batch: fetches that of a step. total: updates of the run."""

    parts: Parts
    state: RunState
    batch: Callable[[int], Minibatch]
    total: int


def compiled_step(t: Trial) -> tuple[Graph | None, str]:
    """The graph, if steps of it work and agree with those of `train_step`; else why it is of no use."""
    parts, before = t.parts, t.state.snapshot().copy()
    unchanged = Unchanged(parts.model, [parts.objective, *parts.transforms])
    try:
        first = _sound(t, range(_MOST_TRIED))[0]
        if not any(train_step(parts, first, 0.0).permitted for _ in range(_MOST_HALVED)):
            return None, "no update of the first batches is applied"  # so the optimizer has no state
        if not unchanged():
            return None, "the model, the objective or a transform changes its attributes in a step"
        if _draws_elsewhere(parts, t.batch(0)):
            return None, ELSEWHERE
        batch, expected = _sound(t, range(1, _MOST_TRIED + 1))
        graph = Graph(parts, batch)
        try:
            attempts = [graph(batch, 0.0), graph(batch, 0.0), graph(batch, 0.0, check=True)]
        except Exception as error:
            forget_failed_traces()
            return None, first_line(error)
    finally:
        t.state.restore(before)
    for attempt in attempts:
        if attempt is None:
            return None, "the first batches are not as usual"
        found = attempt.loss.item(), attempt.grad_norm.item()
        if not all(map(_close, expected, found)):
            return None, _differs("compiled", found, expected)
    return graph, ""


def _sound(t: Trial, steps: range) -> tuple[Minibatch, tuple[float, float]]:
    """The first of these batches whose loss and gradient norm are finite, and which is not refused for what
    it makes of running statistics; and these numbers. Else the last.
    """
    for step in steps:
        batch = t.batch(step)
        found = probe(t.parts, batch)
        if all(map(math.isfinite, found[:2])) and found.growth <= t.parts.guard.most_growth(step):
            break
    return batch, found[:2]


def _draws_elsewhere(parts: Parts, batch: Minibatch) -> bool:
    """Whether a forward pass draws random numbers that are not torch's, or not of its device."""

    def draw() -> tuple[float, ...]:
        of_cpu = () if parts.device.type == "cpu" else (torch.rand(()).item(),)
        return random.random(), np.random.random(), *of_cpu

    losses_of(parts, batch)
    drawn = draw()
    *_, last = pieces_of(parts, batch)
    parts.generators.seed(seed_of(parts.draws, batch.slots.step, last.micro))
    return drawn != draw()


def first_line(error: Exception) -> str:
    """What went wrong, in short."""
    cause = getattr(error, "inner_exception", None) or error  # torch wraps what happens in a compiler
    return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or ['?'])[0]}"


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_TOLERANCE)


def refusal(parts: Parts) -> str:
    """Why no graph of the whole step is possible, or nothing."""
    optimizer = parts.updater.optimizer
    if not known(optimizer) or not parts.updater.well_known:
        return f"optimizer {type(optimizer).__name__} has no graph, or is hooked into, or has no eps"
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


def captured_step(t: Trial) -> tuple[Captured | None, str]:
    """The captured step, if it works and agrees with that of `train_step`; else why it is of no use."""
    parts = t.parts
    name = type(parts.updater.optimizer).__name__
    if not parts.updater.asks_device:
        return (
            None,
            f"optimizer {name}'s step cannot take the guard's go-ahead from the GPU, as fused ones do",
        )
    if parts.updater.is_hooked():
        return None, f"something is hooked to the step of optimizer {name}"
    if any(getattr(m, hooks) for m in parts.model.modules() for hooks in HOOKS) or any(
        map(hooked, parts.params)
    ):
        return None, "something is hooked to the model"
    if parts.physical < parts.micro:
        return None, "compute.micro_batch splits the recipe's micro-batches"
    if not all(isinstance(leaf, Tensor) for leaf in leaves(t.batch(0).data)):
        return None, "batches hold more than tensors"
    before = t.state.snapshot().copy()
    unchanged = Unchanged(parts.model, [parts.objective, *parts.transforms])
    batch = t.batch(1 if t.total > 1 else 0)
    try:
        train_step(parts, t.batch(0), 0.0)
        if not unchanged():
            return None, "the model, the objective or a transform changes its attributes in a step"
        if _draws_elsewhere(parts, t.batch(0)):
            return None, f"{ELSEWHERE}, or from those of the CPU"
        with _waiting_is_an_error():  # which a capture that waits is, too, but leaves broken
            train_step(parts, batch, 0.0)
        expected = probe(parts, batch)[:2]
        graph = Captured(parts)
        found = graph.try_out(batch)
    except SurefootError:
        raise
    except Exception as error:
        return None, _why_not_captured(error)
    finally:
        t.state.restore(before)
    for attempt in found:
        numbers = attempt.loss.item(), attempt.grad_norm.item()
        alike = all(math.isclose(a, b, rel_tol=_REPEATS) for a, b in zip(expected, numbers, strict=True))
        if not alike and all(map(math.isfinite, expected)):
            return None, _differs("captured", numbers, expected)
    return graph, ""


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """Within it, torch refuses what makes the host wait for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _why_not_captured(error: Exception) -> str:
    if "synchronizing" in str(error):
        return "the model or the objective waits for the GPU, as .item() and boolean indices do"
    return first_line(error)


def _differs(how: str, found: tuple[float, float], expected: tuple[float, float]) -> str:
    numbers = "loss {:.6g} and gradient norm {:.6g}".format
    return f"a {how} step has {numbers(*found)}, an eager one {numbers(*expected)}"
