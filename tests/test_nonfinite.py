"""An update that is not finite is never applied, and never hidden."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, mlp, recipe
from torch import nn

import surefoot as sf
from surefoot.guard.detect import GRADIENT_SPIKE, LOSS_SPIKE, NOT_FINITE, STATISTICS_SPIKE
from surefoot.guard.watch import Watch
from surefoot.optim.update import Updater

BAD = [3, 4, 11]


def poisoned(values=(np.nan, np.inf, -np.inf)):
    """256 samples of which three steps of an unshuffled run (batch 16) hold a bad one."""
    x, y = blobs(256)
    for step, value in zip(BAD, values, strict=True):
        x[step * 16 + 5, 2] = value
    return sf.Arrays(x, y)


def batch_norm():
    return nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Linear(8, 3)
    )


OPTIMIZERS = [
    sf.SGD(lr=0.1, momentum=0.9),
    sf.SGD(lr=0.1, momentum=0.9, nesterov=True, fused=True),
    sf.AdamW(lr=0.01),
    sf.AdamW(lr=0.01, fused=True),
    sf.NAdamW(),
    sf.RMSprop(momentum=0.9),
    sf.Adagrad(),
    sf.Adadelta(),
    sf.Adafactor(),
]


def copies(model, optimizer=None):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("spec", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize("model", [mlp, batch_norm])
def test_a_refused_update_leaves_everything_as_it_was(tmp_path, spec, model):
    before = None
    changed = recipe(
        model=model,
        data=poisoned(),
        optimizer=spec,
        batch=sf.Batch(16, shuffle=False, micro=8),
        until="1ep",
        gradient=(sf.clip_norm(1.0),),
    )
    for outcome in sf.steps(changed, out=tmp_path / "run"):
        now = copies(outcome.model)
        if outcome.step in BAD:
            assert not outcome.permitted
            assert before is not None
            assert all(torch.equal(now[name], before[name]) for name in now)
        else:
            assert outcome.permitted
            assert all(torch.isfinite(value).all() for value in now.values())
            assert before is None or not torch.equal(now["0.weight"], before["0.weight"])
        before = now
    view = sf.open_run(tmp_path / "run")
    log, summary = view.log(), view.summary()
    assert log["step"][~log["permitted"]].tolist() == BAD
    assert log["step"].tolist() == list(range(16))
    assert (log["update_ratio"][~log["permitted"]] == 0).all()
    skipped = [e for e in view.events() if e["kind"] == "skipped"]
    assert [e["step"] for e in skipped] == BAD
    assert all("finite" in e["reason"] for e in skipped)
    assert summary["quarantined"] == [step * 16 + 5 for step in BAD]
    assert summary["interventions"] == 3
    assert view.verify() == []


@pytest.mark.parametrize("spec", OPTIMIZERS, ids=repr)
def test_it_equals_a_run_whose_bad_batches_were_never_there(tmp_path, spec):
    """State of the optimizer included: what follows a refused update is as if it had not been tried."""
    x, y = blobs(256)
    clean = np.delete(np.arange(256).reshape(16, 16), BAD, axis=0).ravel()
    settings = {"optimizer": spec, "batch": sf.Batch(16, shuffle=False), "until": "1ep"}
    bad = sf.fit(recipe(data=poisoned(), **settings), out=tmp_path / "bad")
    good = sf.fit(recipe(data=sf.Arrays(x[clean], y[clean]), **settings), out=tmp_path / "good")
    assert bad.digest == good.digest


def test_the_first_update_may_be_the_refused_one(tmp_path):
    x, y = blobs(64)
    x[0, 0] = np.nan
    for spec in OPTIMIZERS:
        settings = {"optimizer": spec, "batch": sf.Batch(16, shuffle=False), "until": "2ep"}
        done = sf.fit(recipe(data=sf.Arrays(x, y), **settings), out=tmp_path / repr(spec))
        assert done.interventions == 1  # in the second epoch it is left out
        assert all(torch.isfinite(v).all() for v in done.model.state_dict().values())


def test_the_device_path_decides_as_the_host_path(monkeypatch):
    """What runs on a GPU, run on the CPU: fused optimizers take the go-ahead as a tensor. The first
    update is the refused one, after dirtying freed memory: torch alone would keep what lay there."""
    for spec in (sf.SGD(lr=0.1, momentum=0.9, fused=True), sf.AdamW(lr=0.01, fused=True)):
        ends = []
        for on_device in (False, True):
            torch.manual_seed(0)
            model = mlp()
            params = list(model.parameters())
            updater = Updater(spec.build([{"params": params}]), params, measure_every=1)
            if on_device:
                updater._asks_device = True
                updater._create_momentum()
            for step in range(6):
                for p in params:
                    torch.full_like(p, 1e30)  # dirt
                    p.grad = torch.ones_like(p) if step % 3 else torch.full_like(p, torch.nan)
                permitted = torch.tensor(bool(step % 3))
                updater.apply(permitted, step=step, multiplier=1.0, base=[0.1], grad_norm=torch.tensor(1.0))
            ends.append([p.detach().clone() for p in params])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_run_that_only_diverges_stops(tmp_path):
    x, y = blobs(256)
    x[:, 0] = np.nan
    changed = recipe(data=sf.Arrays(x, y), until="100ep")
    done = sf.fit(changed, out=tmp_path / "run")
    assert (done.status, done.step, done.exit_code) == ("diverged", 0, 3)
    reason = sf.open_run(tmp_path / "run").summary()["reason"]
    assert reason.startswith("4 steps in a row were not finite (step 3); going back to step 0")
    again = sf.fit(changed, out=tmp_path / "run")
    assert (again.status, again.step) == ("diverged", 0)


def test_so_many_refused_updates_in_a_row_end_the_run(tmp_path):
    changed = recipe(
        optimizer=sf.SGD(lr=1e-3),
        objective=sf.supervised(lambda out, y, reduction: F.cross_entropy(out, y, reduction="none") * 1e35),
        precision="fp16",
        until="100ep",
        guard=sf.Guard(max_refused_in_a_row=20),
    )
    done = sf.fit(changed, out=tmp_path / "run")
    assert (done.status, done.step, done.exit_code) == ("diverged", 20, 3)
    assert "20 updates in a row" in sf.open_run(tmp_path / "run").summary()["reason"]


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (NOT_FINITE, "not finite whatever the batch"),
        (GRADIENT_SPIKE, "the gradient stays far above"),
        (LOSS_SPIKE, "the loss stays far above"),
        (STATISTICS_SPIKE, "what goes into a normalisation layer varies far above"),
    ],
)
def test_what_was_refused_so_often_is_said(verdict, words):
    guard = Watch(sf.Guard(max_refused_in_a_row=3), torch.device("cpu"))
    rows = [
        guard.review(step=s, loss=9.0, verdict=verdict, permitted=False, expected=True) for s in range(3)
    ]
    assert rows[:2] == [None, None]
    assert rows[2].reason.startswith("3 updates in a row were refused, up to step 2: ")
    assert words in rows[2].reason


def test_fp16_finds_its_scale_and_says_what_it_skips(fit):
    x, y = blobs(256)
    done = fit(data=sf.Arrays(x * 30, y), optimizer=sf.SGD(lr=1e-3), precision="fp16", until="4ep")
    log = sf.open_run(done.run_dir).log()
    refused = ~log["permitted"]
    assert refused.any()
    assert done.interventions == refused.sum()
    assert refused[0]
    assert not refused[-1]
    scales = log["loss_scale"]
    assert scales[0] == 65536
    assert (np.diff(scales)[refused[:-1]] < 0).all()
    assert (np.diff(scales)[~refused[:-1]] == 0).all()
    reasons = {e["reason"] for e in sf.open_run(done.run_dir).events() if e["kind"] == "skipped"}
    assert reasons == {"fp16 overflow: loss scale halved"}
    assert np.isfinite(log["loss"]).all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_full_precision_does(fit, precision):
    full, half = fit(until="6ep"), fit(until="6ep", precision=precision)
    losses = [sf.open_run(r.run_dir).log()["loss"] for r in (full, half)]
    assert not np.array_equal(*losses)
    np.testing.assert_allclose(losses[1][-8:].mean(), losses[0][-8:].mean(), atol=0.05)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())


def test_fp16_doubles_its_scale_after_enough_good_updates():
    from surefoot.optim.precision import LossScale

    scale = LossScale(torch.device("cpu"))
    scale.adjust(torch.tensor(False))
    for _ in range(LossScale.GROWTH_INTERVAL):
        assert scale.scale == 32768
        scale.adjust(torch.tensor(True))
    assert scale.scale == 65536
    again = LossScale(torch.device("cpu"))
    again.load_state_dict(scale.state_dict())
    assert again.state_dict() == scale.state_dict()


MOMENTUM = [sf.SGD(lr=0.1, momentum=0.9), sf.AdamW(lr=0.01)]


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("spec", MOMENTUM, ids=repr)
def test_a_transform_that_gives_no_number_once_costs_one_update(tmp_path, spec, compiled):
    """A gradient of zero, divided by its norm."""

    def normalised(grads, norm):
        torch._foreach_div_(grads, norm)

    def objective(model, data):
        x, y, weight = data
        return F.cross_entropy(model(x), y, reduction="none"), weight

    x, y = blobs(256)
    weight = np.ones(256, np.float32)
    weight[80:96] = 0.0  # step 5
    changed = recipe(
        data=sf.Arrays(x, y, weight),
        objective=objective,
        optimizer=spec,
        gradient=(normalised,),
        batch=sf.Batch(16, shuffle=False),
        until="1ep",
    )
    operations = sf.Operations(compute={"compile": compiled}, progress="off")
    done = sf.fit(changed, out=tmp_path / "run", operations=operations)
    assert done.status == "finished"
    assert np.flatnonzero(sf.open_run(tmp_path / "run").log()["permitted"] == 0).tolist() == [5]


@pytest.mark.parametrize("mode", ["off", "watch"])
@pytest.mark.parametrize("until", [30, 300])
def test_the_end_of_a_run_that_cannot_go_on_depends_on_no_checkpoint(tmp_path, mode, until):
    """With momentum that is no number all updates are refused. The writer of states sees it, some time."""
    x, y = blobs(200)
    x[3] = np.nan
    ended = []
    for every in (7, 1000):
        out = tmp_path / str(every)
        changed = recipe(data=sf.Arrays(x, y), batch=sf.Batch(20), guard=sf.Guard(mode), until=until)
        done = sf.fit(changed, out=out, operations=sf.Operations(checkpoint={"every": every}))
        (told,) = [e["reason"] for e in sf.open_run(out).events() if e["kind"] == "diverged"]
        ended.append((done.status, done.step, done.digest, told))
    assert ended[0] == ended[1]
    assert ended[0][0] == "diverged"
    assert "not finite" in ended[0][3]
