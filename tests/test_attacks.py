"""What an adversary found once, so that it stays found."""

from __future__ import annotations

import enum
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, flat, mlp, recipe, surefoot, surefoot_process
from test_cli import GOOD, listing, write
from torch import nn

import surefoot as sf
from surefoot.identity import describe
from surefoot.record.recorder import Recorder
from surefoot.record.rows import read_newest


def assert_continues_to_the_bit(tmp_path, **changes):
    changed = recipe(**{"until": 12, **changes})
    whole = sf.fit(changed, out=tmp_path / "whole")
    for stop in (3, 4):
        for outcome in sf.steps(changed, out=tmp_path / "parts"):
            if outcome.step == stop:
                break
    parts = sf.fit(changed, out=tmp_path / "parts")
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    return whole


class Scaled(nn.Module):
    def __init__(self, alpha=1.0, init=0.1):
        super().__init__()
        self.alpha, self.inner = alpha, nn.Linear(8, 3)
        nn.init.constant_(self.inner.weight, init)

    def forward(self, x):
        return self.alpha * self.inner(x)


@pytest.mark.parametrize("change", [{"alpha": 2.0}, {"init": 0.2}])
def test_attributes_and_first_weights_of_a_model_are_its_identity(tmp_path, change):
    sf.fit(recipe(model=Scaled), out=tmp_path / "run")
    with pytest.raises(sf.RunDirectoryError, match=r"recipe\.model\."):
        sf.fit(recipe(model=partial(Scaled, **change)), out=tmp_path / "run")


def test_options_are_identity_too(tmp_path):
    file = write(tmp_path)
    assert surefoot("train", file, "--out", tmp_path / "run").returncode == 0
    changed = surefoot("train", file, "name=other", "--out", tmp_path / "run")
    assert changed.returncode == 2
    assert "name: None -> other" in changed.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": sf.SGD(lr=float("nan"))},
        {"optimizer": sf.SGD(lr=float("inf"))},
        {"schedule": sf.linear(to=-1.0)},
    ],
)
def test_rates_that_are_not_finite_are_errors(tmp_path, changes):
    with pytest.raises(sf.RecipeError):
        sf.fit(recipe(**changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_update_that_divides_zero_by_zero_is_undone(tmp_path):
    x, y = blobs(64)
    x[:, 0] = 0  # a weight without a gradient: Adam without eps divides 0 by 0
    changed = recipe(data=sf.Arrays(x, y), optimizer=sf.Adam(eps=0.0), until="40ep")
    done = sf.fit(changed, out=tmp_path / "run")
    assert done.status == "diverged"
    assert all(torch.isfinite(p).all() for p in done.model.parameters())
    events = sf.open_run(tmp_path / "run").events()
    assert {e["reason"] for e in events if e["kind"] == "skipped"} == {
        "the optimizer's update is not finite"
    }


@pytest.mark.parametrize("guard", ["off", "watch", "heal"])
def test_weights_that_are_not_finite_are_never_called_finished(tmp_path, guard):
    """The body makes them so each time that the last step is taken."""
    for outcome in sf.steps(recipe(guard=sf.Guard(guard)), out=tmp_path / "run"):
        if outcome.step == 15:
            with torch.no_grad():
                outcome.model[0].weight.fill_(torch.nan)
    view = sf.open_run(tmp_path / "run")
    assert view.status == "diverged"
    kept = view.checkpoints()[-1]  # for whoever wants to look at it, never to go on from
    assert kept.manifest()["poisoned"]
    assert len([e for e in view.events(all_events=True) if e["kind"] == "rolled_back"]) == 3 * (
        guard == "heal"
    )
    assert view.verify() == []


class LateNorm(nn.Module):
    """Batch norm that is first used in the third forward pass."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(8), mlp()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.inner(self.norm(x) if self.calls > 2 else x)


def test_a_norm_that_is_used_late_is_rolled_back_too(tmp_path):
    x, y = blobs(256)
    x[2 * 16 + 3] = np.nan
    changed = recipe(model=LateNorm, data=sf.Arrays(x, y), batch=sf.Batch(16, shuffle=False), until="1ep")
    done = sf.fit(changed, out=tmp_path / "run")
    assert done.interventions == 1
    assert torch.isfinite(done.model.norm.running_mean).all()


@pytest.mark.parametrize(
    "spec",
    [sf.NAdamW(), sf.Adam(), sf.Adagrad(), sf.Adafactor(), sf.RMSprop(), sf.SGD(lr=0.1, momentum=0.9)],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_continue_to_the_bit(tmp_path, spec, dtype):
    x, y = blobs(64)
    assert_continues_to_the_bit(
        tmp_path,
        model=lambda: mlp().to(dtype),
        data=sf.Arrays(torch.tensor(x).to(dtype), y),
        optimizer=spec,
    )


class Averaging(nn.Module):
    """A running mean in a buffer that is not persistent, used by the output."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("mean", torch.zeros(8), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.inner(x - self.mean)


def test_buffers_that_are_not_persistent_continue_too(tmp_path):
    done = assert_continues_to_the_bit(tmp_path, model=Averaging)
    assert sf.digest(done.model) == done.digest
    path = tmp_path / "twice"  # a second stop before the first step of an attempt loses nothing
    for outcome in sf.steps(recipe(model=Averaging, until=12), out=path):
        if outcome.step == 5:
            break
    next(iter(sf.steps(recipe(model=Averaging, until=12), out=path)))
    assert sf.fit(recipe(model=Averaging, until=12), out=path).digest == done.digest


def test_random_numbers_of_python_and_numpy_in_the_objective(tmp_path):
    def noisy(model, data):
        losses = F.cross_entropy(model(data[0]), data[1], reduction="none")
        return losses * (1 + random.random()) * (1 + np.random.random())

    assert_continues_to_the_bit(tmp_path, objective=noisy)


def test_a_physical_split_with_functional_dropout_is_refused(tmp_path):
    def dropping(model, data):
        return F.cross_entropy(model(F.dropout(data[0], 0.5)), data[1], reduction="none")

    split = sf.Operations(compute={"micro_batch": 5})
    with pytest.raises(sf.OperationsError, match="draws random numbers"):
        sf.fit(recipe(objective=dropping), out=tmp_path / "run", operations=split)
    assert not (tmp_path / "run").exists()


class Named:
    """Rows of a vector, an array, a name and a label."""

    def __init__(self, n=40):
        self.x, self.y = blobs(n)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "name": f"sample {i}", "y": int(self.y[i]), "i": i}


def test_texts_are_split_by_row_and_workers_change_no_type(tmp_path):
    seen = []

    def objective(model, data):
        assert len(data["name"]) == len(data["i"])
        assert data["name"] == [f"sample {i}" for i in data["i"].tolist()]
        seen.append((type(data["name"]), type(data["array"])))
        return F.cross_entropy(model(data["x"]), data["y"], reduction="none")

    def collate(samples):
        rows = torch.utils.data.default_collate(samples)
        return {**rows, "array": np.zeros(len(samples))}

    digests = set()
    for workers in (0, 2):
        done = sf.fit(
            recipe(
                data=sf.Dataset(Named(), collate=collate), objective=objective, batch=sf.Batch(16, micro=5)
            ),
            out=tmp_path / f"{workers}",
            operations=sf.Operations(data={"workers": workers}),
        )
        digests.add(done.digest)
    assert set(seen) == {(list, np.ndarray)}
    assert len(digests) == 1


EVERYTHING = Path(__file__).parent / "recipes/everything.py"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group(tmp_path, number):
    """As schedulers and terminals send it: to the workers, too."""
    command = (
        "train",
        EVERYTHING,
        "epochs=6",
        "pause_s=0.002",
        "--out",
        tmp_path / "run",
        "--workers",
        "2",
    )
    process = surefoot_process(*command, start_new_session=True)
    while (
        not (tmp_path / "run/steps/tail.bin").exists()
        or len(read_newest(tmp_path / "run/steps", 30)["step"]) < 9
    ):
        time.sleep(0.005)
        assert process.poll() is None
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    done = surefoot(*command)
    assert done.returncode == 0
    assert "continues at step" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_loop_begins(tmp_path, number):
    up = tmp_path / "up"
    code = f"import pathlib, time\npathlib.Path({str(up)!r}).touch()\ntime.sleep(30)\n"
    process = surefoot_process("train", write(tmp_path, code=code + GOOD), "--out", tmp_path / "run")
    while not up.exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert not (tmp_path / "run").exists()


def test_a_path_is_an_option_like_any_other(tmp_path):
    path = "__import__('pathlib').Path"
    code = GOOD.replace("lr: Annotated", f"where: {path} = {path}('/x'), lr: Annotated")
    file = write(tmp_path, code=code)
    assert surefoot("train", file, "--out", tmp_path / "run").returncode == 0
    assert surefoot("train", file, "--out", tmp_path / "run").returncode == 0
    assert surefoot("train", file, "where=/y", "--out", tmp_path / "run").returncode == 2


def test_fresh_moves_nothing_for_a_bad_recipe(tmp_path):
    file = write(tmp_path)
    assert surefoot("train", file, "--out", tmp_path / "run").returncode == 0
    before = listing(tmp_path)
    assert surefoot("train", file, "epochs=-1", "--out", tmp_path / "run", "--fresh").returncode == 2
    assert listing(tmp_path) == before


FIRST_STEP = {
    "a shape that does not fit": ({"model": lambda: nn.Linear(3, 3)}, "mat1 and mat2 shapes"),
    "a dataset that raises": ({"data": sf.Dataset([1 / 3] * 9)}, "needs data that is (inputs, targets)"),
    "whole-number losses": ({"objective": lambda m, d: d[1]}, "that have no gradient"),
    "detached losses": (
        {"objective": lambda m, d: F.cross_entropy(m(d[0]).detach(), d[1], reduction="none")},
        "that have no gradient",
    ),
}


@pytest.mark.parametrize("name", FIRST_STEP)
def test_what_fails_in_the_first_step_leaves_nothing_behind(tmp_path, name):
    changes, says = FIRST_STEP[name]
    with pytest.raises(sf.UsageError) as caught:
        sf.fit(recipe(**changes), out=tmp_path / "run")
    assert says in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": lambda: 1 / 0},
        {"model": lambda argument: argument},
        {"groups": ("*.bias",)},
        {"early_stopping": 5},
        {"validation": sf.Arrays(*blobs(4))},
        {"schedule": sf.cosine},
        {"optimizer": sf.SGD},
        {"optimizer": "adam"},
        {"gradient": (1.0,)},
        {"gradient": (sf.clip_norm,)},
        {"seed": True},
        {"batch": 32},
        {"guard": None},
    ],
)
def test_wrong_types_in_a_recipe(tmp_path, changes):
    with pytest.raises(sf.UsageError):
        sf.fit(recipe(**changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_state_that_cannot_be_kept_is_refused_before_training(tmp_path):
    def make():
        model = mlp()
        model.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
        return model

    with pytest.raises(sf.RecipeError, match=r"odd is a torch\.complex128"):
        sf.fit(recipe(model=make), out=tmp_path / "run")


@pytest.mark.parametrize("where", ["objective", "metric"])
def test_an_error_within_the_run_ends_the_workers(tmp_path, where):
    """At exit multiprocessing terminates its children once and waits for ever."""
    changes = {
        "objective": "objective=lambda m, d: 1 / 0 if next(COUNT) > 3 else LOSS(m, d)",
        "metric": "validation=sf.Validation("
        "ROWS, {'m': lambda m, d: 1 / 0 if next(COUNT) > 1 else d[0][:, 0]})",
    }[where]
    code = GOOD + (
        "\nimport itertools\nCOUNT, LOSS = itertools.count(), sf.supervised(F.cross_entropy)\n"
        "ROWS = sf.Dataset([(torch.ones(4) * i, i % 2) for i in range(64)])\n"
    )
    file = write(tmp_path, f"data=ROWS, {changes}", code)
    begun = time.monotonic()
    done = surefoot("train", file, "--out", tmp_path / "run", "--workers", "2")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert time.monotonic() < begun + 60


def test_one_damaged_run_does_not_hide_the_others(tmp_path):
    file = write(tmp_path)
    assert surefoot("train", file, "--out", tmp_path / "runs/good").returncode == 0
    (tmp_path / "runs/bad").mkdir()
    (tmp_path / "runs/bad/run.json").write_text('{"schema": 2}')
    listed = surefoot("runs", tmp_path / "runs")
    assert listed.returncode == 0
    assert "finished" in listed.stdout
    assert "was altered or is torn" in listed.stderr


def test_steps_count_from_zero(fit):
    with pytest.raises(IndexError):
        sf.open_run(fit().run_dir).plan.ids(-1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sf.clip_norm("1"),
        lambda: sf.clip_norm(None),
        lambda: sf.clip_value([1.0]),
        lambda: sf.Group(3),
        lambda: sf.Group("*", lr="fast"),
        lambda: sf.Guard(max_refused_in_a_row="many"),
        lambda: sf.EarlyStopping(metric=3),
        lambda: sf.EarlyStopping(patience="long"),
        lambda: sf.EarlyStopping(mode="up"),
        lambda: sf.Validation(sf.Arrays(*blobs(4)), batch="all"),
        lambda: sf.Validation(sf.Arrays(*blobs(4)), metrics={"a": int}),
        lambda: sf.Arrays([[1, 2], [3]]),
        lambda: sf.supervised(3),
        lambda: sf.warmup(3) * "2",
        lambda: sf.constant() * float("nan"),
        lambda: sf.warmup(3) >> 3,
        lambda: sf.cosine(to="low"),
        lambda: sf.linear(to=None),
        lambda: sf.linear(start=float("nan")),
        lambda: sf.step(every=5, factor="half"),
        lambda: sf.exponential(gamma="a"),
        lambda: sf.one_cycle(peak="early"),
        lambda: sf.restarts(period=3, growth=1.5),
        lambda: sf.plateau(mode="up"),
        lambda: sf.plateau(patience=-1),
        lambda: sf.Operations(device=3),
        lambda: sf.open_run(3),
    ],
)
def test_wrong_types_in_a_spec(make):
    with pytest.raises(sf.UsageError):
        make()


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (sf.SGD(lr="fast"), "SGD: lr = 'fast' must be a number."),
        (sf.Adam(betas=0.9), "Adam: betas = 0.9 must be (a number, a number)."),
        (sf.AdamW(amsgrad=1), "AdamW: amsgrad = 1 must be True or False."),
        (sf.Adafactor(eps=("a", 1.0)), "must be (a number or None, a number)."),
    ],
)
def test_wrong_types_in_an_optimizer(tmp_path, optimizer, says):
    with pytest.raises(sf.RecipeError) as caught:
        sf.fit(recipe(optimizer=optimizer), out=tmp_path / "run")
    assert says in str(caught.value)


def test_what_fails_in_the_first_validation_is_told_as_the_recipes(tmp_path):
    broken = sf.Validation(sf.Arrays(*blobs(4)), metrics={"accuracy": lambda model, data: data["x"]})
    with pytest.raises(sf.RecipeError, match="the first validation failed: TypeError"):
        sf.fit(recipe(validation=broken), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_end_is_refused(tmp_path):
    with pytest.raises(sf.RecipeError, match="more updates than any run"):
        sf.fit(recipe(until="1e400ep"), out=tmp_path / "run")


STUCK = """
import time, numpy as np, torch, torch.nn.functional as F, surefoot as sf
class Stuck:
    def __len__(self): return 64
    def __getitem__(self, i):
        if i >= 32: time.sleep(600)
        return torch.ones(3), 1
def recipe() -> sf.Recipe:
    return sf.Recipe(model=lambda: torch.nn.Linear(3, 2), data=sf.Dataset(Stuck()), until="1ep",
        objective=sf.supervised(F.cross_entropy), optimizer=sf.SGD(lr=0.1),
        batch=sf.Batch(8, shuffle=False))
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_request_to_stop_does_not_wait_for_a_batch(tmp_path, workers):
    process = surefoot_process(
        "train", write(tmp_path, code=STUCK), "--out", tmp_path / "run", "--workers", str(workers)
    )
    while (
        not (tmp_path / "run/steps/tail.bin").exists()
        or len(read_newest(tmp_path / "run/steps", 9)["step"]) < 4
    ):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert sf.open_run(tmp_path / "run").checkpoints()[-1].step == 4


# ------------------------------------------------------------------------- a second attack


def overflowing(hidden):
    """A gradient that is finite and a step that is not: 1e10 times a rate of 1e30."""

    def objective(model, data):
        x, y, big = data
        outputs = model(x)
        losses = F.cross_entropy(outputs, y, reduction="none")
        return torch.where(big > 0, outputs[:, 0] * 1e10, losses * 1e-32)

    x, y = blobs(64)
    big = np.zeros(64, np.float32)
    big[33] = 1
    return recipe(
        guard=sf.Guard("off"),  # which would refuse it before
        model=lambda: nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 3)),
        data=sf.Arrays(x, y, big),
        objective=objective,
        optimizer=sf.SGD(lr=1e30, momentum=0.9),
        batch=sf.Batch(8, shuffle=False),
        until=8,
    )


@pytest.mark.parametrize("hidden", [4, 20_000])
def test_an_update_that_overflows_is_undone_whatever_the_size(tmp_path, hidden):
    """Weights and momentum: what follows is not refused for it."""
    weights = []
    for outcome in sf.steps(overflowing(hidden), out=tmp_path / "run"):
        weights.append(flat(outcome.model))
        assert torch.isfinite(weights[-1]).all()
    log = sf.open_run(tmp_path / "run").log()
    assert log["permitted"].tolist() == [True] * 4 + [False] + [True] * 3
    assert torch.equal(weights[4], weights[3])
    skipped = [e for e in sf.open_run(tmp_path / "run").events() if e["kind"] == "skipped"]
    assert [e["reason"] for e in skipped] == ["the optimizer's update is not finite"]


class Reassigned(nn.Module):
    """A buffer that the model puts another tensor in the place of, as many do."""

    def __init__(self, persistent):
        super().__init__()
        self.inner = nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8), persistent=persistent)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return self.inner(x - self.mean)


class OfAnotherType(torch.nn.Module):
    """A buffer that is not kept, of whole numbers at first."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8, dtype=torch.int64), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean = self.mean + 0.25
        return self.net(x + self.mean)


def test_a_buffer_that_becomes_one_of_another_type_continues(tmp_path):
    changed = recipe(model=OfAnotherType, until=40)
    whole = sf.fit(changed, out=tmp_path / "whole")
    sf.fit(changed, out=tmp_path / "parts", operations=sf.Operations(budget={"updates": 15}))
    done = sf.fit(changed, out=tmp_path / "parts")
    assert (done.digest, done.model.mean.tolist()) == (whole.digest, whole.model.mean.tolist())


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_is_reassigned_is_undone_and_continued(tmp_path, persistent):
    x, y = blobs(256)
    x[100] = np.nan
    changed = recipe(
        model=lambda: Reassigned(persistent), data=sf.Arrays(x, y), batch=sf.Batch(16, shuffle=False)
    )
    whole = sf.fit(changed, out=tmp_path / "whole")
    assert whole.interventions == 1  # then the sample is left out
    for stop in (3, 9):
        for outcome in sf.steps(changed, out=tmp_path / "parts"):
            if outcome.step == stop:
                break
    parts = sf.fit(changed, out=tmp_path / "parts")
    assert parts.digest == whole.digest
    assert torch.equal(parts.model.mean, whole.model.mean)
    assert torch.isfinite(whole.model.mean).all()


def test_a_loop_that_is_never_left_does_not_hold_up_the_end_of_the_process(tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import recipe, sf
taken = sf.steps(recipe(), out=sys.argv[2])
next(taken), next(taken)
"""
    tests = Path(__file__).parent
    command = [sys.executable, "-c", code, tests, tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    view = sf.open_run(tmp_path / "run")
    assert (view.status, view.checkpoints()[-1].step) == ("preempted", 2)


class Loss(enum.Enum):
    MSE = 1
    L1 = 2


class Keeps:
    def __init__(self, value):
        self._value = value

    def __call__(self, model, data):
        return F.cross_entropy(model(data[0]), data[1], reduction="none")


class Slotted(Keeps):
    __slots__ = ("hidden",)

    def __init__(self, value):
        super().__init__(0)
        self.hidden = value


def closing_over(value):
    def objective(model, data):
        assert value is not None
        return F.cross_entropy(model(data[0]), data[1], reduction="none")

    return objective


def with_default(value):
    def objective(model, data, *, weight=value):
        return F.cross_entropy(model(data[0]), data[1], reduction="none")

    return objective


@pytest.mark.parametrize("make", [Keeps, Slotted, closing_over, with_default])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Loss.MSE, Loss.L1),
        ({"lr": 0.01}, {"lr": 0.1}),
        (torch.ones(3), torch.zeros(3)),
        (nn.SmoothL1Loss(beta=1.0), nn.SmoothL1Loss(beta=0.5)),
        (closing_over(1), closing_over(2)),
        (frozenset("abc"), frozenset("abd")),
    ],
)
def test_what_an_objective_holds_is_its_identity(make, before, after):
    assert describe(make(before)) == describe(make(before))
    assert describe(make(before)) != describe(make(after))


def test_identity_is_the_same_in_every_process(tmp_path):
    """Sets have another order in each."""
    signature = (
        "tags: set[str] = {'a', 'b', 'c', 'd'}, mode: Kind = Kind.A, "
        "where: pathlib.Path = pathlib.Path('x/y')"
    )
    code = GOOD.replace("def recipe(", f"def recipe({signature}, ")
    assert signature in code
    code = "import enum, pathlib\nclass Kind(enum.Enum):\n    A = 'a'\n    B = 'b'\n" + code
    file = write(tmp_path, code=code)
    for _ in range(3):
        done = surefoot("train", file, "--out", tmp_path / "run", fresh=True)
        assert done.returncode == 0, done.stderr
    other = surefoot("train", file, "mode=b", "--out", tmp_path / "run")
    assert other.returncode == 2
    assert "mode: Kind.A -> Kind.B" in other.stderr


def test_lost_checkpoints_are_found(tmp_path, fit):
    done = fit()
    (*_, newest) = sf.open_run(done.run_dir).checkpoints()
    shutil.rmtree(newest.path)
    assert [f.what for f in sf.open_run(done.run_dir).verify()] == ["the newest checkpoint is missing"]


def test_a_kill_between_a_checkpoint_and_its_event_loses_nothing(tmp_path, monkeypatch):
    """Later checkpoints that no event tells of are no reason to miss the one that they replaced."""
    real = Recorder.event

    def event(self, kind, **facts):
        if kind != "checkpointed" or facts["step"] < 4:
            real(self, kind, **facts)

    monkeypatch.setattr(Recorder, "event", event)
    done = sf.fit(
        recipe(), out=tmp_path / "run", operations=sf.Operations(checkpoint={"every": 2, "keep_last": 2})
    )
    view = sf.open_run(done.run_dir)
    told = [e["name"] for e in view.events() if e["kind"] == "checkpointed"]
    assert told[-1] not in {c.path.name for c in view.checkpoints()}
    assert view.verify() == []


class Moody:
    """A source whose length changes after a while."""

    def __init__(self, to):
        self.n, self.to, self.calls = 64, to, 0

    def __len__(self):
        return self.n

    def fetch(self, ids):
        self.calls += 1
        if self.calls == 4:
            self.n = self.to
        if ids.max() >= self.n:
            raise IndexError(ids.max())
        return torch.ones(len(ids), 8), torch.ones(len(ids), dtype=torch.int64)


@pytest.mark.parametrize("to", [20, 80])
def test_a_dataset_that_changes_its_length_is_an_error(tmp_path, to):
    with pytest.raises(sf.DataError, match="samples now, and had 64"):
        sf.fit(recipe(data=Moody(to), batch=sf.Batch(8)), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "operations", "says"),
    [
        (
            {"optimizer": lambda groups: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)},
            {},
            "other parameters",
        ),
        ({}, {"checkpoint": {"keep_best": 2}}, "needs a validation"),
        (
            {"validation": sf.Validation(sf.Arrays(*blobs(16)))},
            {"checkpoint": {"keep_best": 2, "keep_metric": "accuracy"}},
            "checkpoint.keep_best watches 'accuracy'",
        ),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, changes, operations, says):
    with pytest.raises(sf.UsageError, match=says):
        sf.fit(recipe(**changes), out=tmp_path / "run", operations=sf.Operations(**operations))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["x" * 300, "a\0b"])
def test_paths_that_are_none(tmp_path, out):
    with pytest.raises(sf.RunDirectoryError):
        sf.fit(recipe(), out=f"{tmp_path}/{out}")


@pytest.mark.parametrize(
    "wrong",
    [
        {"checkpoint": {"keep_last": True}},
        {"data": {"workers": True}},
        {"budget": {"cost": float("inf"), "price_per_hour": 1.0}},
        {"budget": {"time": "3ep"}},
        {"hang_after": "soon"},
        {"data": {"timeout": 5}},
    ],
)
def test_wrong_operations(wrong):
    with pytest.raises(sf.OperationsError):
        sf.Operations(**wrong)


def test_the_process_is_left_as_it_was(tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    sf.fit(recipe(), out=tmp_path / "run", operations=sf.Operations(compute={"threads": threads + 1}))
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert torch.get_num_threads() == threads


def test_a_finished_run_leaves_nothing_that_is_of_no_use(fit):
    done = fit()
    assert {p.name for p in done.run_dir.iterdir()} == {
        "run.json", "events.jsonl", "steps", "checkpoints", "LOCK",
    }  # fmt: skip


def test_a_process_that_waits_for_the_lock_never_gets_one_without_a_name(tmp_path):
    """The holder removes the file, or another takes it over, while two processes wait."""
    code = textwrap.dedent("""
        import sys, time, pathlib
        from surefoot.record import lock
        file = pathlib.Path(sys.argv[1])
        mine = lock.take(file, [])
        print("has it", flush=True)
        for _ in range(12000):
            if pathlib.Path(sys.argv[2]).exists():
                break
            time.sleep(0.01)
        if len(sys.argv) > 3:
            file.unlink()
        mine.release()
    """)

    def start(*arguments):
        command = [sys.executable, "-c", code, str(tmp_path / "LOCK"), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    one, other = tmp_path / "one", tmp_path / "other"
    first = start(str(one), "remove")
    assert first.stdout.readline() == "has it\n"
    second = start(str(other))
    time.sleep(1.5)  # it is waiting by now
    one.touch()
    assert second.stdout.readline() == "has it\n"
    third = start(str(other))
    _, err = third.communicate(timeout=60)
    assert "in use by process" in err, err
    other.touch()
    assert (first.wait(), second.wait()) == (0, 0)
