"""Divergences that can be made again: each a recipe that goes wrong, for the guard to heal.

Gaussian mixture of 10 classes in 32 dimensions; an MLP 32-64-64-10; SGD 0.05 with momentum 0.9; batch 64;
1,200 updates, each sample seen once, so that samples can be spoilt by the step in which they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import surefoot as sf
from surefoot.api import result, run_steps
from surefoot.build import build
from surefoot.data.plan import Plan
from surefoot.operations import Operations
from surefoot.record.folder import RunFolder

STEPS, BATCH, FEATURES, CLASSES = 1200, 64, 32, 10
Meddle = Callable[[int, Any], None]


def mixture(seed: int, n: int, *, centres_seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    centres = np.random.default_rng(centres_seed).normal(size=(CLASSES, FEATURES)) * 0.55
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, n)
    return (centres[y] + rng.normal(size=(n, FEATURES))).astype("float32"), y


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES)
    )


def accuracy(model: nn.Module, data: Any) -> torch.Tensor:
    return (model(data[0]).argmax(1) == data[1]).float()


@dataclass
class Scenario:
    """number, name: as in the list. recipe: by seed and guard. meddle: what a fault of the machine does
    before the given step. metric, best: what is compared, and whether more is better.
    """

    number: int
    name: str
    recipe: Callable[[int, sf.Guard], sf.Recipe]
    meddle: Meddle | None = None
    metric: str = "accuracy"
    best: str = "max"
    facts: dict[str, Any] = field(default_factory=dict)


def base(seed: int, guard: sf.Guard, **changes: Any) -> sf.Recipe:
    spoil = changes.pop("spoil", None)
    batch = changes.pop("size", BATCH)
    steps = changes.pop("steps", STEPS)
    x, y = mixture(1000 + seed, batch * steps)
    plan = Plan(len(x), batch, seed=seed)
    if spoil is not None:
        spoil(x, y, plan)
    settings: dict[str, Any] = {
        "model": mlp,
        "data": sf.Arrays(x, y),
        "objective": sf.supervised(F.cross_entropy),
        "optimizer": sf.SGD(lr=0.05, momentum=0.9),
        "batch": sf.Batch(batch),
        "until": steps,
        "validation": sf.Validation(
            sf.Arrays(*mixture(1, 2000)), metrics={"accuracy": accuracy}, every=steps, batch=2000
        ),
        "guard": guard,
        "seed": seed,
    }
    return sf.Recipe(**(settings | changes))


def spoiling(steps: range, how: Callable[[np.ndarray, np.ndarray, np.ndarray], None]) -> Any:
    def spoil(x: np.ndarray, y: np.ndarray, plan: Plan) -> None:
        for step in steps:
            how(x, y, plan.ids(step))

    return spoil


def _nan(x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> None:
    x[ids[0], 3] = np.nan


def _corrupt(x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> None:
    rng = np.random.default_rng(int(ids[0]))
    x[ids] *= np.where(rng.random((len(ids), FEATURES)) < 0.05, 1e4, 1.0).astype("float32")


def _mislabel(x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> None:
    y[ids] = np.random.default_rng(int(ids[0])).integers(0, CLASSES, len(ids))


def _faint(x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> None:
    x[ids] *= 1e-4


class _Overflow(torch.autograd.Function):
    """The identity, whose gradient overflows where it is told to."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(where)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (where,) = ctx.saved_tensors
        return torch.where(where[:, None], torch.inf, grad), None


def overflowing(model: nn.Module, data: Any) -> torch.Tensor:
    x, y = data
    marked = x[:, 0] > 500
    x = torch.where(marked[:, None], x / 1000, x)
    return F.cross_entropy(_Overflow.apply(model(x), marked), y, reduction="none")


def _mark(x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> None:
    x[ids[:1]] = np.abs(x[ids[:1]]) * 1000 + 1000


class RNN(nn.Module):
    """A ReLU RNN that begins at 1.03 times the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, 32, nonlinearity="relu", batch_first=True)
        with torch.no_grad():
            self.rnn.weight_hh_l0.copy_(1.03 * torch.eye(32))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def recurrent(seed: int, guard: sf.Guard) -> sf.Recipe:
    rng = np.random.default_rng(2000 + seed)
    x = rng.random((64 * 250, 128, 1)).astype("float32")
    y = np.clip((x[:, -8:].sum((1, 2)) / 8 * CLASSES).astype(int), 0, CLASSES - 1)
    return sf.Recipe(
        model=RNN,
        data=sf.Arrays(x, y),
        objective=sf.supervised(F.cross_entropy),
        optimizer=sf.SGD(lr=0.05, momentum=0.9),
        batch=sf.Batch(64),
        until=250,
        validation=sf.Validation(sf.Arrays(x[:500], y[:500]), metrics={"accuracy": accuracy}, every=250),
        guard=guard,
        seed=seed,
    )


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scales = torch.linspace(0.1, 1.0, 8)
        return 0.5 * (scales * self.w**2).sum() + 0.5 + 0.0 * x[:, 0]


def quadratic(seed: int, guard: sf.Guard) -> sf.Recipe:
    x = np.random.default_rng(seed).normal(size=(64 * 8, 1)).astype("float32")
    return sf.Recipe(
        model=Quadratic,
        data=sf.Arrays(x),
        objective=lambda model, data: model(data),
        optimizer=sf.SGD(lr=2.04),
        batch=sf.Batch(64),
        until=STEPS,
        validation=sf.Validation(sf.Arrays(x), every=STEPS),
        guard=guard,
        seed=seed,
    )


def batch_normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64),
        nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def _reinitialise(step: int, run: Any) -> None:
    if step == 600:
        torch.manual_seed(5)
        run.state.model[2].reset_parameters()


def _momentum(step: int, run: Any) -> None:
    if step == 600:
        for slots in run.state.optimizer.state.values():
            slots["momentum_buffer"].mul_(200.0)


def _flip(step: int, run: Any) -> None:
    if step == 700:
        weight = run.state.model[4].weight.data.view(-1)
        weight[7:8].view(torch.int32).bitwise_xor_(1 << 30)


SCENARIOS = [
    Scenario(1, "rate 3 from the start", lambda s, g: base(s, g, optimizer=sf.SGD(lr=3.0, momentum=0.9))),
    Scenario(
        2, "rate 0.2, batch 16", lambda s, g: base(s, g, optimizer=sf.SGD(lr=0.2, momentum=0.9), size=16)
    ),
    Scenario(
        3,
        "rate x 100 from step 500",
        lambda s, g: base(s, g, schedule=sf.constant(over=500) >> sf.constant() * 100.0),
    ),
    Scenario(
        4, "a NaN every 97 steps", lambda s, g: base(s, g, spoil=spoiling(range(97, STEPS, 97), _nan))
    ),
    Scenario(5, "corrupt shard", lambda s, g: base(s, g, spoil=spoiling(range(500, 505), _corrupt))),
    Scenario(
        6, "random labels for 40 steps", lambda s, g: base(s, g, spoil=spoiling(range(600, 640), _mislabel))
    ),
    Scenario(7, "exploding recurrent network", recurrent),
    Scenario(
        8,
        "gradient overflow every 50 steps",
        lambda s, g: base(s, g, objective=overflowing, spoil=spoiling(range(50, STEPS, 50), _mark)),
    ),
    Scenario(9, "a layer is initialised again at 600", base, meddle=_reinitialise),
    Scenario(10, "momentum x 200 at 600", base, meddle=_momentum),
    Scenario(11, "a bit of a weight flips at 700", base, meddle=_flip),
    Scenario(12, "quadratic beyond the stable rate", quadratic, metric="loss", best="min"),
    Scenario(
        13,
        "Adam without eps, faint inputs",
        lambda s, g: base(
            s, g, optimizer=sf.Adam(lr=1e-3, eps=1e-12), spoil=spoiling(range(600, 1000), _faint)
        ),
    ),
    Scenario(
        14,
        "batch norm at batch 2",
        lambda s, g: base(s, g, model=batch_normed, size=2, optimizer=sf.SGD(lr=0.2, momentum=0.9)),
    ),
]


def play(scenario: Scenario, seed: int, guard: sf.Guard, out: Path) -> sf.Result:
    """Runs a scenario; what the machine does wrong happens once, however often the step is repeated."""
    built = build(scenario.recipe(seed, guard), RunFolder(out), Operations(progress="off"))
    built.run.alone = False
    done: set[int] = set()
    for outcome in run_steps(built):
        step = outcome.step + 1
        if scenario.meddle is not None and step not in done:
            done.add(step)
            scenario.meddle(step, built.run)
    return result(built)


def all_of() -> Iterator[Scenario]:
    yield from SCENARIOS
