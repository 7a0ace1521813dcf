"""Runs whose steps do not repeat to the bit: a model that draws from the system's randomness, in effect as
kernels do that add in no fixed order. That a replay differs is no fault of the machine then.
"""

import os
import warnings

import numpy as np
import pytest
import torch
from conftest import recipe
from scenarios import mlp
from test_heal import continued_after_a_kill, events, jump
from torch import nn

import surefoot as sf
from surefoot.api import result, run_steps
from surefoot.build import build
from surefoot.measure.readings import Readings
from surefoot.passes import losses_of
from surefoot.prepare import prepare
from surefoot.record.folder import RunFolder

EAGER = sf.Operations(compute={"compile": "off"}, progress="off")


class Unrepeatable(nn.Module):
    def __init__(self, net=None):
        super().__init__()
        self.net = mlp() if net is None else net

    def forward(self, x):
        drawn = np.frombuffer(os.urandom(x.numel()), "uint8").reshape(x.shape)
        return self.net(x + 1e-7 * torch.from_numpy(drawn.astype("float32")))


@pytest.mark.parametrize("lag", [0, 8])
@pytest.mark.parametrize("lr", [1e-6, 2.0], ids=["slow", "too fast"])
def test_a_run_that_learns_nothing_goes_on(tmp_path, monkeypatch, lr, lag):
    """There is nothing to be learned. It is looked into if the rate did harm."""
    begin = Readings.__init__
    monkeypatch.setattr(Readings, "__init__", lambda self, on: begin(self, on) or setattr(self, "lag", lag))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2000, 8)).astype("float32"), rng.integers(0, 3, 2000)
    changed = recipe(
        model=lambda: Unrepeatable(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))),
        data=sf.Arrays(x, y),
        optimizer=sf.SGD(lr=lr),
        until=1000,
    )
    done = sf.fit(changed, out=tmp_path / "run")
    (told,) = events(done.run_dir, "alarm")
    assert told["detector"] == "D6"
    assert ("otherwise each time" in told["reason"]) == (lr == 2.0)
    assert events(done.run_dir, "rolled_back") == []
    assert done.status == "finished"


def test_a_run_that_goes_wrong_is_healed(tmp_path):
    done = sf.fit(jump(model=Unrepeatable), out=tmp_path / "run")
    (back,) = events(done.run_dir, "rolled_back")
    assert (back["step"], back["cause"]) == (400, "the learning rate jumped")
    assert "otherwise each time" in back["reason"]
    assert done.status == "finished"
    assert done.metrics["accuracy"] > 0.9


def test_a_run_that_is_continued_tells_of_it_and_goes_on(tmp_path):
    done = continued_after_a_kill(tmp_path, model=Unrepeatable)
    (told,) = events(tmp_path / "killed", "alarm")
    assert told["detector"] == "D7"
    assert "otherwise each time" in told["reason"]
    assert events(tmp_path / "killed", "rolled_back") == []
    assert done.status == "finished"


class NoSuchKernel(torch.autograd.Function):
    """An operation that torch refuses where only kernels that repeat will do, in its backward pass."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, grad):
        return grad.clone().put_(torch.tensor([0]), grad.flatten()[:1])


class Normed(nn.Module):
    def __init__(self, *, refused):
        super().__init__()
        self.net, self.refused = (
            nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)),
            refused,
        )

    def forward(self, x):
        x = self.net(x)
        return NoSuchKernel.apply(x) if self.refused else x


def taken_strictly(tmp_path, **changes):
    """A run that asks for kernels that repeat, as on a GPU; whether it still does at the end."""
    built = build(recipe(until=30, batch=sf.Batch(32, micro=8), **changes), RunFolder(tmp_path), EAGER)
    built.run.parts.kernels.strict = True
    before = torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*deterministic")
        for _ in run_steps(built):
            pass
    assert torch.get_deterministic_debug_mode() == before
    return result(built), built.run.parts.kernels.strict


def test_an_operation_without_a_kernel_that_repeats_is_taken_by_any(tmp_path):
    done, strict = taken_strictly(tmp_path / "refused", model=lambda: Normed(refused=True))
    as_ever = sf.fit(
        recipe(until=30, batch=sf.Batch(32, micro=8), model=lambda: Normed(refused=False)),
        out=tmp_path / "whole", operations=EAGER,
    )  # fmt: skip
    assert not strict
    assert (done.step, done.digest, done.ledger) == (30, as_ever.digest, as_ever.ledger)


def test_kernels_that_repeat_are_asked_for_in_each_step(tmp_path):
    asked = []

    class Asks(nn.Linear):
        def forward(self, x):
            asked.append(torch.get_deterministic_debug_mode())
            return super().forward(x)

    _, strict = taken_strictly(tmp_path, model=lambda: Asks(8, 3))
    assert strict
    assert set(asked) == {2}


def test_rows_are_of_any_kernel_from_the_step_on_in_which_one_was_refused(tmp_path):
    class Turns(nn.Linear):
        num = 0

        def forward(self, x):
            self.num += 1
            x = super().forward(x)
            return NoSuchKernel.apply(x) if self.num > 10 else x

    built = build(recipe(until=30, model=lambda: Turns(8, 3)), RunFolder(tmp_path), EAGER)
    built.run.parts.kernels.strict = True
    for _ in run_steps(built):
        pass
    assert (built.run.parts.kernels.strict, built.run.parts.kernels.free_from) == (False, 10)


def test_other_errors_are_the_models(tmp_path):
    class Fails(nn.Linear):
        def forward(self, x):
            raise RuntimeError("shapes")

    with pytest.raises(sf.RecipeError, match="RuntimeError: shapes"):
        taken_strictly(tmp_path, model=lambda: Fails(8, 3))


class Accumulates(nn.Module):
    """Keeps a sum in a way that leaves no trace; half-way to it, torch refuses an operation."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 3)
        self.register_buffer("total", torch.zeros(1))

    def forward(self, x):
        x.clone().put_(torch.tensor([0]), x.flatten()[:1])
        self.total.data.add_(1.0)
        return self.net(x)


@pytest.mark.parametrize("strict", [False, True])
def test_what_a_refused_pass_did_not_come_to_is_undone_later(strict):
    made = prepare(recipe(model=Accumulates, until=30), EAGER)
    made.parts.kernels.strict = strict
    batch = made.feed(lambda *_, **__: None).at(0)
    for _ in range(3):
        losses_of(made.parts, batch)
    assert not made.parts.kernels.strict
    assert made.parts.model.total.item() == 0.0


@pytest.mark.parametrize("free_from", [0, 450])
def test_rows_from_before_any_kernel_would_do_may_differ_by_rounding(tmp_path, free_from):
    built = build(jump(), RunFolder(tmp_path), EAGER)
    built.run.parts.kernels.free_from = free_from
    rows, changed = built.run.healer.rows, False
    for outcome in run_steps(built):
        if outcome.step >= 440 and not changed:
            (i,) = (i for i, row in enumerate(rows) if row.step == 430)
            rows[i] = rows[i]._replace(loss=rows[i].loss * 1.0000001)
            changed = True
    back = events(tmp_path, "rolled_back")[0]
    fault = "step 430 does not reproduce: the machine made a mistake there"
    assert back["cause"] == ("the learning rate jumped" if free_from else fault)
