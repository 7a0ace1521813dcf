"""Random numbers are functions of what they are for, not of what was drawn before."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, mlp, recipe
from torch import nn

import surefoot as sf
from surefoot.data.feed import Feed
from surefoot.data.plan import Plan
from surefoot.keys import key


class Draws:
    """A dataset of random numbers from all three generators."""

    def __init__(self, n=24):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return i, random.random(), float(np.random.random()), torch.rand(2)


def draws(seed=0, epochs=3, batch=5, tail="keep", workers=0, start=0):
    """(epoch, sample) -> what it drew."""
    source = sf.Dataset(Draws())
    plan = Plan(len(source), batch, tail, seed=seed)
    feed = Feed(source, plan, seed, torch.device("cpu"), workers)
    found = {}
    for batch_ in feed.batches(start, int(epochs * plan.updates_per_epoch)):
        ids, a, b, c = batch_.data
        slots = batch_.slots
        owners = slots.epochs if slots.epochs is not None else [slots.epoch] * len(slots.ids)
        for k, (i, epoch) in enumerate(zip(slots.ids.tolist(), owners, strict=True)):
            if i >= 0:
                assert ids[k] == i
                found[int(epoch), i] = (a[k].item(), b[k].item(), *c[k].tolist())
    return found


def test_augmentation_depends_on_seed_epoch_and_sample_only():
    reference = draws()
    assert len(reference) == 72
    assert len(set(reference.values())) == 72
    for other in (draws(batch=7), draws(batch=24), draws(tail="straddle"), draws(tail="pad", batch=9)):
        assert other == {k: v for k, v in reference.items() if k in other}
    assert draws(workers=2) == reference
    late = draws(start=8)
    assert late == {k: reference[k] for k in late}
    assert not set(draws(seed=1).values()) & set(reference.values())


def test_fetching_leaves_the_generators_of_the_process_alone():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    sf.Dataset(Draws()).fetch_keyed(np.arange(5), np.arange(5).astype(np.uint64))
    assert (random.random(), np.random.random(), torch.rand(1)) == expected


class Masks(nn.Module):
    """Keeps the dropout masks it drew."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop = mlp(), nn.Dropout(0.5)

    def forward(self, x):
        if self.training:
            mask = self.drop(torch.ones_like(x))
            SEEN.append(mask)
            x = x * mask
        return self.inner(x)


SEEN: list[torch.Tensor] = []


def masks(out, *, upto=None, **changes):
    """Masks of each step."""
    SEEN.clear()
    found = []
    for outcome in sf.steps(recipe(model=Masks, **changes), out=out):
        found.append((outcome.step, torch.cat(SEEN)))
        SEEN.clear()
        random.random()
        torch.rand(3)  # what the body draws does not matter
        if outcome.step == upto:
            break
    return dict(found)


def test_dropout_depends_on_seed_step_and_micro_batch_only(tmp_path):
    whole = masks(tmp_path / "a", batch=sf.Batch(32, micro=8))
    flat = torch.stack(list(whole.values()))
    assert len(torch.unique(flat.flatten(1), dim=0)) == len(whole)
    by_micro = flat[0].reshape(4, -1)
    assert len(torch.unique(by_micro, dim=0)) == 4
    masks(tmp_path / "b", batch=sf.Batch(32, micro=8), upto=4)
    rest = masks(tmp_path / "b", batch=sf.Batch(32, micro=8))
    assert list(rest) == list(range(5, 16))
    assert all(torch.equal(whole[t], rest[t]) for t in rest)
    other = masks(tmp_path / "c", batch=sf.Batch(32, micro=8), optimizer=sf.Adam(lr=0.01), until=4)
    assert all(torch.equal(whole[t], other[t]) for t in other)
    assert not torch.equal(masks(tmp_path / "d", batch=sf.Batch(32, micro=8), seed=1)[0], whole[0])


def test_the_model_is_made_as_after_manual_seed(fit):
    made = []

    def make():
        made.append((random.random(), np.random.random(), torch.rand(1).item()))
        return mlp()

    fit(model=make, seed=3, until=1)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    assert made == [(random.random(), np.random.random(), torch.rand(1).item())]


def test_two_fresh_runs_are_the_same_bits_and_seeds_differ(fit):
    x, y = blobs(100)
    changes = {"model": Masks, "data": sf.Arrays(x, y), "batch": sf.Batch(16)}
    assert fit(**changes).digest == fit(**changes).digest
    assert fit(**changes).digest != fit(**changes, seed=1).digest


def test_validation_is_without_a_trace(fit):
    """A stochastic metric, frozen batch norm and dropout: validating often changes nothing."""

    def noisy(model, data):
        return torch.rand(len(data[1]))

    def make():
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
        model[1].eval()
        return model

    v = sf.Arrays(*blobs(33, seed=1))
    runs = [
        fit(model=make, validation=validation)
        for validation in (
            None,
            sf.Validation(v, every=1),
            sf.Validation(v, {"noise": noisy}, every=1, batch=7),
        )
    ]
    assert len({r.digest for r in runs}) == 1
    assert runs[1].metrics["loss"] == pytest.approx(runs[2].metrics["loss"], rel=1e-6)
    assert not runs[0].model[1].training
    assert runs[0].model[2].training
    assert key(0, "a") == key(0, "a")


def test_validation_metrics_are_exact_means(fit):
    x, y = blobs(97, seed=4)
    done = fit(
        validation=sf.Validation(
            sf.Arrays(x, y),
            {
                "accuracy": lambda m, d: (m(d[0]).argmax(1) == d[1]).float(),
                "weighed": lambda m, d: (d[0][:, 0], d[1].float()),
            },
            batch=10,
        )
    )
    model = done.model.eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(x))
    target = torch.from_numpy(y)
    assert done.metrics["accuracy"] == pytest.approx((logits.argmax(1) == target).double().mean().item())
    assert done.metrics["loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)
    assert done.metrics["weighed"] == pytest.approx(np.average(x[:, 0], weights=y), rel=1e-6)


def test_torchmetrics(fit):
    torchmetrics = pytest.importorskip("torchmetrics", reason="not run: needs torchmetrics")
    x, y = blobs(97, seed=4)
    metrics = {
        "counted": torchmetrics.Accuracy("multiclass", num_classes=3, average="micro"),
        "averaged": lambda m, d: (m(d[0]).argmax(1) == d[1]).float(),
    }
    done = fit(validation=sf.Validation(sf.Arrays(x, y), metrics, batch=10))
    assert done.metrics["counted"] == pytest.approx(done.metrics["averaged"], abs=1e-7)
