"""Samples of the first batch, before which nothing is known, that would ruin running statistics."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import recipe, surefoot
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import base, mixture
from test_statistics import ADAM, COMPILED, EAGER, MODELS, SGD, cases, events, normed_inputs
from torch import nn

import surefoot as sf
from surefoot.blame import unlike_others
from surefoot.data.plan import Plan
from surefoot.measure.readings import Readings
from surefoot.optim.buffers import Buffers
from surefoot.passes import seen_of
from surefoot.prepare import prepare

NUM, BATCH = 5000, 64


def planted(seed, scale, *, first=2, more=25):
    """Inputs, targets, and which samples are far too large: some of the first batch, others anywhere."""
    rng = np.random.default_rng(seed)
    x, y = mixture(7 + seed, NUM)
    ids = Plan(NUM, BATCH, seed=seed).ids(0)
    bad = np.unique([*rng.permutation(ids)[:first], *rng.permutation(NUM)[:more]])
    x[bad] *= scale
    return x, y, bad


def changed(seed, model, data, **changes):
    made = base(seed, sf.Guard(), model=model, size=BATCH)
    return dataclasses.replace(made, data=sf.Arrays(*data), **changes)


HERE = {("mlp", "sgd", 1e2, 0), ("cnn", "adam", 1e4, 1)}


@pytest.mark.parametrize(("model", "optimizer", "scale", "seed"), cases(HERE))
def test_all_are_named_and_no_others(tmp_path, model, optimizer, scale, seed):
    """Of each other one is in every third batch, so that statistics that begin with one stay as it left
    them.
    """
    x, y, bad = planted(seed, scale)
    options = {"optimizer": SGD if optimizer == "sgd" else ADAM, "until": "10ep", "schedule": sf.cosine()}
    clean = changed(seed, MODELS[model], mixture(7 + seed, NUM), **options)
    calm = sf.fit(clean, out=tmp_path / "clean", operations=EAGER)
    assert sf.open_run(calm.run_dir).summary()["quarantined"] == []
    done = sf.fit(changed(seed, MODELS[model], (x, y), **options), out=tmp_path / "run", operations=EAGER)
    view = sf.open_run(done.run_dir)
    assert view.summary()["quarantined"] == bad.tolist()
    assert view.log()["permitted"][0] == 1
    told = [e for e in events(done.run_dir, "quarantined") if e["step"] == 0]
    assert len(told) == 1
    assert set(told[0]["ids"]) == set(bad) & set(Plan(NUM, BATCH, seed=seed).ids(0))
    assert done.status == "finished"
    assert done.metrics["accuracy"] >= 0.99 * calm.metrics["accuracy"]
    assert view.verify() == []


@pytest.mark.parametrize("operations", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_a_run_that_is_continued_leaves_out_the_same(tmp_path, operations):
    x, y, _ = planted(0, 1e4)
    whole = sf.fit(
        changed(0, MODELS["mlp"], (x, y), until=200), out=tmp_path / "whole", operations=operations
    )
    for stop in (0, 1, 70):
        made = changed(0, MODELS["mlp"], (x, y), until=200)
        for outcome in sf.steps(made, out=tmp_path / "parts", operations=operations):
            if outcome.step == stop:
                break
    done = sf.fit(
        changed(0, MODELS["mlp"], (x, y), until=200), out=tmp_path / "parts", operations=operations
    )
    assert (done.digest, done.ledger) == (whole.digest, whole.ledger)
    assert sf.open_run(done.run_dir).summary()["quarantined"]


def test_it_is_explained_and_replayed(tmp_path):
    x, y, bad = planted(0, 1e4, more=0)
    made = changed(0, normed_inputs, (x, y), until=100)
    sf.fit(made, out=tmp_path / "run", operations=EAGER)
    replayed = sf.replay_step(made, tmp_path / "run", step=0)
    assert replayed.verdict == "reproduced"
    assert not set(bad.tolist()) & set(replayed.ids)
    explained = " ".join(surefoot("explain", tmp_path / "run").stdout.split())
    assert "first batch: the running statistics of batch norm '0' would have begun" in explained
    assert "an update was refused" not in explained


def test_a_run_that_is_watched_is_left_alone(tmp_path):
    x, y, _ = planted(0, 1e4, more=0)
    made = changed(0, normed_inputs, (x, y), until=20, guard=sf.Guard("watch"))
    done = sf.fit(made, out=tmp_path / "run", operations=EAGER)
    assert sf.open_run(done.run_dir).summary()["quarantined"] == []


def looked_at(model, x, batch, *, micro=None):
    """What stands out in the first batch of x, float32[n, features]; the state is as before."""
    y = np.zeros(len(x), "int64")
    made = prepare(
        recipe(
            model=model, data=sf.Arrays(x, y), batch=sf.Batch(batch, micro=micro, shuffle=False), until=1
        ),
        EAGER,
    )
    before = [b.clone() for b in made.parts.model.buffers()]
    found = unlike_others(made.parts, made.feed(lambda *_, **__: None).at(0))
    assert all(map(torch.equal, before, made.parts.model.buffers()))
    return found


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_stands_out_is_found_wherever_it_is(data):
    batch = data.draw(st.integers(32, 300))
    bad = sorted(data.draw(st.sets(st.integers(0, batch - 1), max_size=7)))
    unit, offset = data.draw(st.sampled_from([1e-2, 1.0, 1e3])), data.draw(st.sampled_from([0.0, 30.0]))
    scale = data.draw(st.sampled_from([1e3, 1e6, 1e30]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    x = rng.normal(size=(batch, 32)).astype("float32")
    x = (x + offset) * unit
    x[bad] *= scale
    found = looked_at(normed_inputs, x, batch)
    assert list(found.ids) == bad
    assert (found.growth > 30) == bool(bad)


@pytest.mark.parametrize("micro", [None, 64, 32, 8])
@pytest.mark.parametrize("scale", [5.0, 10.0, 20.0, 40.0, 80.0, 1e4])
def test_the_measure_is_that_of_later_batches(micro, scale):
    """Where running statistics of the others would grow fourfold by a sample, and not otherwise."""
    rng, last = np.random.default_rng(0), 127
    x = rng.normal(size=(128, 32)).astype("float32")
    x[last] *= scale
    model = nn.BatchNorm1d(32)
    model.running_mean.copy_(torch.from_numpy(x[:last].mean(0)))
    model.running_var.copy_(torch.from_numpy(x[:last].var(0)))
    model.num_batches_tracked.fill_(1000)
    buffers = Buffers(model, rows=micro or 128)
    buffers.remember()
    for part in torch.from_numpy(x).split(micro or 128):
        model(part)
    growth = buffers.growth(on_host=True)
    assert not 3.6 < growth < 4.4  # too near to tell
    assert looked_at(normed_inputs, x, 128, micro=micro).ids == ((last,) if growth > 4.0 else ())


def test_a_layer_that_sees_what_is_infinite_in_all_is_no_measure():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")
    x *= 1e30
    assert looked_at(normed_inputs, x, 64).ids == ()


def test_a_pass_that_fails_leaves_running_statistics():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x):
            self.norm(x)
            raise RuntimeError("no memory")

    made = prepare(recipe(model=Fails, until=1), EAGER)
    with pytest.raises(RuntimeError, match="no memory"):
        seen_of(made.parts, made.feed(lambda *_, **__: None).at(0))
    assert made.parts.model.norm.running_var.tolist() == [1.0] * 8


@pytest.mark.parametrize("lag", [0, 8])
def test_the_first_batch_is_the_first_whose_update_is_applied(tmp_path, monkeypatch, lag):
    """Also where the host learns of refused updates later, and sooner where a run is continued."""
    begin = Readings.__init__
    monkeypatch.setattr(Readings, "__init__", lambda self, on: begin(self, on) or setattr(self, "lag", lag))
    x, y = mixture(7, NUM)
    x[: 3 * BATCH] = np.inf
    x[200] *= 1e4
    made = changed(0, normed_inputs, (x, y), until=100, batch=sf.Batch(BATCH, shuffle=False))
    whole = sf.fit(made, out=tmp_path / "whole", operations=EAGER)
    for stop in (2, 3, 6):
        for outcome in sf.steps(made, out=tmp_path / "parts", operations=EAGER):
            if outcome.step == stop:
                break
    parts = sf.fit(made, out=tmp_path / "parts", operations=EAGER)
    assert (parts.digest, parts.ledger) == (whole.digest, whole.ledger)
    assert [e["step"] for e in events(whole.run_dir, "quarantined") if 200 in e["ids"]] == [3]


def test_a_layer_that_mostly_sees_nothing_is_no_measure():
    """All but two samples have no such feature: they are rare, and not wrong."""
    x = np.zeros((64, 32), "float32")
    x[[7, 40], 3] = 1.0
    assert looked_at(normed_inputs, x, 64).ids == ()


def test_one_that_is_just_far_enough_does_not_hide_others():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[[20, 40, 60]] *= 150.0
    x[5] *= 38.0
    assert {20, 40, 60} <= set(looked_at(normed_inputs, x, 64).ids) <= {5, 20, 40, 60}


def test_few_rows_do_not_tell_what_is_rare_from_what_is_wrong():
    x = 0.01 * np.random.default_rng(0).normal(size=(31, 32)).astype("float32")
    x[7, 3] = 1.0
    assert looked_at(normed_inputs, x, 31).ids == ()


def test_many_are_no_exception():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")
    x[:20] *= 1e4
    assert looked_at(normed_inputs, x, 64).ids == ()


class Frozen(nn.Module):
    """As in fine-tuning: one norm that is only applied, one that learns."""

    def __init__(self):
        super().__init__()
        self.frozen, self.norm, self.head = nn.BatchNorm1d(32), nn.BatchNorm1d(32), nn.Linear(32, 3)
        self.frozen.running_var[0] = 1e12  # it knows that this feature is in small units

    def forward(self, x):
        return self.head(self.norm(self.frozen.eval()(x)))


def test_what_a_layer_that_is_only_applied_holds_stays():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")
    x[7, 0] = 1e5
    assert looked_at(Frozen, x, 64).ids == ()
    x[9] *= 1e4
    found = looked_at(Frozen, x, 64)
    assert (found.ids, found.layer) == ((9,), "norm")
