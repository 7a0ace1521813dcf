"""Every partition of a batch has the same gradient."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, flat, recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import surefoot as sf
from surefoot.build import build
from surefoot.operations import Operations
from surefoot.record.folder import RunFolder
from surefoot.train_step import gradients

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def plain(model, data):
    x, y, _ = data
    return F.cross_entropy(model(x), y, reduction="none")


def weighted(model, data):
    x, y, w = data
    return F.cross_entropy(model(x), y, reduction="none"), w


class Weighed:
    """Tells the weights beforehand."""

    def __call__(self, model, data):
        return weighted(model, data)

    def weigh(self, data):
        return data[2]


OBJECTIVES = {"plain": plain, "weighted": weighted, "weighed": Weighed()}


@PROPERTY
@given(
    n=st.integers(2, 40),
    batch=st.integers(1, 40),
    data=st.data(),
    dtype=st.sampled_from(list(TOLERANCE)),
    objective=st.sampled_from(list(OBJECTIVES)),
    tail=st.sampled_from(["keep", "straddle", "pad"]),
    by=st.sampled_from(["recipe", "operations"]),
)
def test_any_partition_gives_the_same_weights(tmp_path_factory, n, batch, data, dtype, objective, tail, by):
    micro = data.draw(st.integers(1, batch))
    x, y = blobs(n)
    w = np.random.default_rng(1).uniform(0.0, 3.0, n) * (np.arange(n) % 5 > 0)
    source = sf.Arrays(torch.tensor(x).to(dtype), y, torch.tensor(w).to(dtype))

    def train(**how):
        operations = sf.Operations(compute={"micro_batch": how.pop("physical", None)})
        changed = recipe(
            model=lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype),
            data=source,
            objective=OBJECTIVES[objective],
            optimizer=sf.SGD(lr=0.1, momentum=0.9),
            batch=sf.Batch(batch, tail=tail, **how),
            until=5,
        )
        return sf.fit(changed, out=tmp_path_factory.mktemp("run") / "r", operations=operations)

    whole = train()
    split = train(micro=micro) if by == "recipe" else train(physical=micro)
    difference = (flat(whole.model) - flat(split.model)).abs().max().item()
    assert difference <= TOLERANCE[dtype]
    assert whole.ledger == split.ledger


def test_token_weights_make_the_mean_over_tokens(fit):
    """Sequences of different lengths: the loss is the mean over all tokens of the batch."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (30, 9), generator=generator)
    lengths = torch.randint(1, 9, (30,), generator=generator)
    targets = torch.where(torch.arange(9) < lengths[:, None], tokens, -100)
    make = lambda: nn.Sequential(nn.Embedding(5, 5), nn.Linear(5, 5))  # noqa: E731

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make()

        def forward(self, x):
            return self.net(x).transpose(1, 2)

    torch.manual_seed(0)
    model = Logits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(12):
        for start in range(0, 30, 13):
            optimizer.zero_grad()
            x, y = tokens[start : start + 13], targets[start : start + 13]
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for micro in (None, 1, 5):
        done = fit(
            model=Logits,
            data=sf.Arrays(tokens, targets),
            objective=sf.supervised(F.cross_entropy),
            optimizer=sf.SGD(lr=0.3),
            batch=sf.Batch(13, shuffle=False, micro=micro),
            until="12ep",
        )
        torch.testing.assert_close(flat(done.model), flat(model), rtol=0, atol=2e-6)


def test_a_batch_in_which_nothing_counts_changes_nothing_and_is_no_divergence(fit):
    x, y = blobs(12)
    w = np.r_[np.ones(4), np.zeros(4), np.ones(4)].astype("float32")
    log = sf.open_run(
        fit(
            data=sf.Arrays(x, y, w),
            objective=weighted,
            optimizer=sf.SGD(lr=0.1),
            batch=sf.Batch(4, shuffle=False),
            until="1ep",
        ).run_dir
    ).log()
    assert log["permitted"].all()
    assert log["loss"][1] == 0
    assert log["update_ratio"][1] == 0


def test_the_rate_does_not_depend_on_accumulation(fit):
    rates = [
        sf.open_run(fit(batch=sf.Batch(32, micro=m), schedule=sf.warmup(5) >> sf.cosine()).run_dir).log()[
            "lr"
        ]
        for m in (None, 8, 5)
    ]
    assert np.array_equal(rates[0], rates[1])
    assert np.array_equal(rates[0], rates[2])


def test_no_more_rows_go_through_the_model_at_once_than_operations_say(fit):
    rows = []

    def noted(model, data):
        rows.append(len(data[0]))
        return plain(model, (*data, None))

    fit(objective=noted, batch=sf.Batch(20), until=5, operations={"compute": {"micro_batch": 6}})
    assert rows[-4:] == [6, 6, 6, 2]
    assert max(rows) == 6


def test_gradients_are_those_of_the_parameters_that_have_one(tmp_path):
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used = nn.Linear(2, 2), nn.Linear(8, 3)

        def forward(self, x):
            return self.used(x)

    run = build(recipe(model=Partly), RunFolder(tmp_path / "run"), Operations(progress="off")).run
    _, trained, grads, _ = gradients(run.parts, run.feed.at(0))
    assert [*map(id, trained)] == [*map(id, run.parts.model.used.parameters())]
    assert all(p.grad is grad for p, grad in zip(trained, grads, strict=True))
    run.record.discard()


def test_a_physical_split_that_would_change_dropout_is_refused(fit):
    make = lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))  # noqa: E731
    with pytest.raises(sf.OperationsError, match=r"treats the rows of a micro-batch together"):
        fit(model=make, operations={"compute": {"micro_batch": 4}})


class Looked(nn.Module):
    """Looks numbers up that its inputs are turned into."""

    def __init__(self, sparse):
        super().__init__()
        self.table, self.out = nn.Embedding(50, 8, sparse=sparse), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.table((x.abs() * 10).long().clamp(max=49)).mean(1))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize(
    "optimizer", [sf.SGD(lr=0.1, momentum=0.9), sf.AdamW(lr=0.01)], ids=["sgd", "adamw"]
)
def test_sparse_gradients_are_learned_from_as_dense_ones(tmp_path, objective, optimizer):
    x, y = blobs(200)
    weights = np.random.default_rng(0).random(200).astype(np.float32)

    def log(sparse):
        changed = recipe(
            model=lambda: Looked(sparse),
            data=sf.Arrays(x, y, weights),
            objective=objective,
            optimizer=optimizer,
            batch=sf.Batch(20, micro=8),
            gradient=(sf.clip_norm(0.1),),
            until=40,
        )
        done = sf.fit(changed, out=tmp_path / str(sparse))
        assert done.status == "finished"
        return sf.open_run(done.run_dir).log()

    dense, sparse = log(False), log(True)
    for name in ("loss", "grad_norm", "update_ratio"):
        np.testing.assert_allclose(sparse[name], dense[name], rtol=1e-4)
