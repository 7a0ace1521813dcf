"""Faults for game days: what `surefoot chaos` does to a run within its own process, once it is ready.

Neither recipe nor data on disk change: a feed, a schedule or an objective is wrapped, or the state is
touched once. So the run keeps its identity, and what the guard replays is spoilt alike where the fault lies
in the data, and not where it was the machine's.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surefoot.data.feed import Feed
from surefoot.errors import OperationsError
from surefoot.optim.schedules import Curve, Resolved
from surefoot.train import Run
from surefoot.types import HOLE, Ids, Slots, Tree, leaves, map_leaves

Meddle = Callable[[int], None]
"""Called after each attempted update with the number of updates done."""
_TIMES, _APART, _BLOCK_STEPS, _NOISY_STEPS = 5, 10, 5, 40
_HUGE, _FASTER, _LONGER = 1e4, 100.0, 200.0
_SLOW_S, _SLOW_FOR_S, _FULL_S = 0.5, 5.0, 3.0


@dataclass(frozen=True)
class Fault:
    """exact: the end must have the bits of the undisturbed run. outside: it is done to the process, or to
    the files of the run, from another process.
    """

    says: str
    exact: bool = False
    outside: bool = False


FAULTS = {
    "nan-samples": Fault("five samples that are not finite from a step on"),
    "huge-samples": Fault(
        "five samples that are from a step on ten thousand times too large, their sign turned"
    ),
    "corrupt-block": Fault("five batches in which one number in twenty is ten thousand times too large"),
    "label-noise": Fault("forty batches whose targets are shuffled"),
    "rate-x100": Fault("a learning rate a hundred times too high from a step on"),
    "bit-flip": Fault("the highest bit of a weight's exponent flips"),
    "momentum": Fault("what the optimizer keeps becomes two hundred times too large"),
    "overflow": Fault("the gradient overflows, as in fp16, in five steps"),
    "kill": Fault("SIGKILL, and the same command again", exact=True, outside=True),
    "slow-disk": Fault("every sync of the disk takes half a second longer, for five seconds", exact=True),
    "full-disk": Fault("the disk takes nothing for three seconds", exact=True),
    "lost-checkpoint": Fault("stopped, and the newest checkpoint is gone", exact=True, outside=True),
    "flipped-checkpoint": Fault(
        "stopped, and a bit of the newest checkpoint flips", exact=True, outside=True
    ),
    "stalled-worker": Fault("a process that reads data stands still, until data.timeout", exact=True),
}


def inject(name: str, run: Run, at: int) -> Meddle:
    """Makes a fault happen at about step `at` of a run that is ready; what is to be called after each step.

    Raises:
        OperationsError: this run cannot have it.
    """
    return {
        "nan-samples": lambda: _spoil_samples(run, at, _not_finite),
        "huge-samples": lambda: _spoil_samples(run, at, _too_large),
        "corrupt-block": lambda: _spoil(run, range(at, at + _BLOCK_STEPS), _corrupt),
        "label-noise": lambda: _spoil(run, range(at, at + _NOISY_STEPS), _shuffle_targets),
        "rate-x100": lambda: _raise_rate(run, at),
        "bit-flip": lambda: _once(at, lambda: _flip(run)),
        "momentum": lambda: _once(at, lambda: _lengthen(run)),
        "overflow": lambda: _overflow(run, at),
        "slow-disk": lambda: _slow_disk(at),
        "full-disk": lambda: _full_disk(at),
        "stalled-worker": lambda: _stall(run, at),
    }[name]()


def _some(at: int) -> range:
    return range(at, at + _TIMES * _APART, _APART)


def _once(at: int, action: Callable[[], None]) -> Meddle:
    """However often the step is repeated: the machine errs once."""
    done = False

    def meddle(step: int) -> None:
        nonlocal done
        if step >= at and not done:
            done = True
            action()

    return meddle


def _nothing(step: int) -> None:
    pass


# ---------------------------------------------------------------------------------- data

How = Callable[[list[Tensor], NDArray[np.bool_]], None]


@dataclass(frozen=True)
class _Spoilt(Feed):
    """A feed that spoils samples in some steps, whenever these are taken.

    bad: the samples; None: all of those steps.
    """

    steps: range = range(0)
    bad: Ids | None = None
    how: How = lambda tensors, rows: None

    @property
    def at_hand(self) -> bool:
        """No: each batch goes through `fetch`."""
        return False

    def fetch(self, slots: Slots) -> Tree:
        """Rows, some of them spoilt."""
        data, ids = super().fetch(slots), slots.ids
        rows = (ids != HOLE) if self.bad is None else np.isin(ids, self.bad)
        if slots.step in self.steps and rows.any():
            data = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, data)
            self.how([leaf for leaf in leaves(data) if isinstance(leaf, Tensor)], rows)
        return data


def _spoil_samples(run: Run, at: int, how: How) -> Meddle:
    """The first samples of some steps, from step `at` on for good."""
    firsts = np.array([run.feed.plan.ids(step)[0] for step in _some(at) if step < run.total])
    return _spoil(run, range(at, run.total), how, bad=firsts)


def _spoil(run: Run, steps: range, how: How, *, bad: Ids | None = None) -> Meddle:
    tensors = [leaf for leaf in leaves(run.feed.at(0).data) if isinstance(leaf, Tensor)]
    if how is _shuffle_targets and len(tensors) < 2:
        raise OperationsError("label-noise needs data that are (inputs, targets).")
    if how is not _shuffle_targets and not (tensors and tensors[0].is_floating_point()):
        kind = tensors[0].dtype if tensors else "no tensors"
        raise OperationsError(f"this fault needs inputs that are floating-point numbers; they are {kind}.")
    kept = {f.name: getattr(run.feed, f.name) for f in fields(Feed) if f.init}
    run.feed = run.healer.feed = _Spoilt(**kept, steps=steps, bad=bad, how=how)
    return _nothing


def _not_finite(tensors: list[Tensor], rows: NDArray[np.bool_]) -> None:
    tensors[0][torch.from_numpy(rows)] = torch.nan


def _too_large(tensors: list[Tensor], rows: NDArray[np.bool_]) -> None:
    tensors[0][torch.from_numpy(rows)] *= -_HUGE


def _corrupt(tensors: list[Tensor], rows: NDArray[np.bool_]) -> None:
    which = torch.from_numpy(np.random.default_rng(0).random(tensors[0].shape) < 0.05)
    which &= torch.from_numpy(rows).reshape(-1, *[1] * (tensors[0].ndim - 1))
    tensors[0][which] *= _HUGE


def _shuffle_targets(tensors: list[Tensor], rows: NDArray[np.bool_]) -> None:
    at = np.flatnonzero(rows)
    moved = np.random.default_rng(len(at)).permutation(at)
    tensors[-1][torch.from_numpy(at)] = tensors[-1][torch.from_numpy(moved)].clone()


# ---------------------------------------------------------------------------------- the course


def _raise_rate(run: Run, at: int) -> Meddle:
    def faster(start: int, curve: Curve) -> Curve:
        return lambda t: curve(t) * (_FASTER if start + t >= at else 1.0)

    curves = tuple((start, n, faster(start, curve)) for start, n, curve in run.schedule.curves)
    run.schedule = run.healer.schedule = Resolved(curves, run.schedule.total, run.schedule.plateau)
    return _nothing


class _Infinite(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor) -> Tensor:
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.inf


def _overflow(run: Run, at: int) -> Meddle:
    objective, when = run.parts.objective, set(_some(at))

    def overflowing(model: torch.nn.Module, data: Tree) -> Any:
        found = objective(model, data)
        if run.state.step not in when:
            return found
        losses, *weights = found if isinstance(found, tuple) else (found,)
        losses = _Infinite.apply(losses)  # type: ignore[no-untyped-call]
        return (losses, *weights) if weights else losses

    run.parts = run.healer.parts = replace(run.parts, objective=overflowing)
    return _nothing


def _flip(run: Run) -> None:
    weights = [p for p in run.parts.params if p.ndim > 1 and p.dtype == torch.float32] or run.parts.params
    flat = weights[-1].detach().view(-1)
    flat[:1].view(torch.int32).bitwise_xor_(1 << 30)


def _lengthen(run: Run) -> None:
    for slots in run.state.optimizer.state.values():
        for value in slots.values():
            if isinstance(value, Tensor) and value.ndim:
                value.mul_(_LONGER)


# ---------------------------------------------------------------------------------- the machine


def _slow_disk(at: int) -> Meddle:
    sync, until = os.fsync, 0.0

    def slowly(fd: Any) -> None:
        if time.monotonic() < until:
            time.sleep(_SLOW_S)
        sync(fd)

    os.fsync = slowly

    def begin() -> None:
        nonlocal until
        until = time.monotonic() + _SLOW_FOR_S

    return _once(at, begin)


def _full_disk(at: int) -> Meddle:
    write, until = os.write, 0.0

    def refuse(fd: int, data: Any) -> int:
        if time.monotonic() < until and stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    os.write = refuse

    def begin() -> None:
        nonlocal until
        until = time.monotonic() + _FULL_S

    return _once(at, begin)


def _stall(run: Run, at: int) -> Meddle:
    if not (run.feed.workers and hasattr(run.feed.source, "fetch_keyed")):
        raise OperationsError(
            "stalled-worker needs processes that read data.",
            fix="A Dataset source, and --set data.workers=2.",
        )

    def stop() -> None:
        workers = multiprocessing.active_children()
        if workers and workers[0].pid:
            os.kill(workers[0].pid, signal.SIGSTOP)

    return _once(at, stop)
