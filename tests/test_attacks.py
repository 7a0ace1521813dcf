"""What an adversary found once, so that it stays found."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, mlp, recipe, surefoot, surefoot_process
from test_cli import GOOD, listing, write
from torch import nn

import surefoot as sf
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


def test_weights_that_are_not_finite_are_never_called_finished(tmp_path):
    for outcome in sf.steps(recipe(), out=tmp_path / "run"):
        if outcome.step == 15:
            with torch.no_grad():
                outcome.model[0].weight.fill_(torch.nan)
    view = sf.open_run(tmp_path / "run")
    assert view.status == "diverged"
    (kept,) = view.checkpoints()  # for whoever wants to look at it, never to go on from
    assert kept.manifest()["poisoned"]


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
    slow = write(tmp_path, code="import time\ntime.sleep(30)\n" + GOOD)
    process = surefoot_process("train", slow, "--out", tmp_path / "run")
    time.sleep(2.5)
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
