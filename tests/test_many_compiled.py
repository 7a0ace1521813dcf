"""Many compiled runs in one process: none leaves its model or graph, and none goes on eagerly unsaid."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import recipe
from torch import nn

import surefoot as sf
from surefoot.api import run_steps
from surefoot.build import build
from surefoot.record.folder import RunFolder

COMPILED = sf.Operations(compute={"compile": "on"}, checkpoint={"every": 3}, progress="off")


def limited(*, to):
    return torch._dynamo.config.patch(recompile_limit=to)


def radam(groups):
    return torch.optim.RAdam(groups, lr=0.01)


def trained(out, **changes):
    """A weak reference to the model of a run that has ended."""
    built = build(recipe(until=8, **changes), RunFolder(out), COMPILED)
    for _ in run_steps(built):
        pass
    return weakref.ref(built.run.parts.model)


@pytest.mark.parametrize("changes", [{}, {"optimizer": radam}], ids=["whole step", "forward pass"])
def test_a_run_that_has_ended_leaves_no_model(changes, tmp_path):
    models = [trained(tmp_path / str(i), **changes) for i in range(2)]
    gc.collect()
    assert [model() for model in models] == [None, None]


def num_graphs():
    for _ in range(2):  # finalizers hold some until the second
        gc.collect()
    return sum(issubclass(type(one), torch.fx.GraphModule) for one in gc.get_objects())


@pytest.mark.parametrize("changes", [{}, {"optimizer": radam}], ids=["whole step", "forward pass"])
def test_a_run_that_has_ended_leaves_no_graph(changes, tmp_path):
    """Which torch would keep, with its kernels and constants, for as long as the process lives."""
    trained(tmp_path / "first", **changes)
    before = num_graphs()
    for i in range(2):
        trained(tmp_path / str(i), **changes)
    assert num_graphs() == before


@limited(to=1)
def test_each_run_is_compiled_however_many_there_were(tmp_path):
    frames = torch._dynamo.utils.counters["frames"]
    for width in (4, 5, 6):
        before = frames["ok"]
        trained(
            tmp_path / str(width),
            optimizer=radam,
            model=lambda width=width: nn.Sequential(nn.Linear(8, width), nn.Linear(width, 3)),
        )
        assert frames["ok"] == before + 1


class Lengths:
    """Sequences, as long as the batch's first sample says."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self._x = rng.normal(size=(64, 6, 8)).astype("float32")
        self._y = torch.from_numpy(rng.integers(0, 3, 64))

    def __len__(self):
        return len(self._x)

    def fetch(self, ids):
        return torch.from_numpy(self._x[ids, : 3 + ids[0] % 4]), self._y[ids.copy()]


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return F.gelu(self.layer(self.norm(x))).softmax(2).mean(1)


@limited(to=2)
@pytest.mark.parametrize("stop", [2, 5])
def test_batches_of_many_forms_are_alike_to_the_bit_wherever_a_run_goes_on(stop, tmp_path):
    """Torch compiles for some forms, and which come first depends on where that is."""
    changed = recipe(model=Pooled, data=Lengths(), batch=sf.Batch(8), optimizer=radam, until=24, seed=stop)
    whole = sf.fit(changed, out=tmp_path / "whole", operations=COMPILED)
    for outcome in sf.steps(changed, out=tmp_path / "parts", operations=COMPILED):
        if outcome.step == stop:
            break
    torch._dynamo.reset()  # as in another process
    parts = sf.fit(changed, out=tmp_path / "parts", operations=COMPILED)
    assert parts.digest == whole.digest


def mixed(model, data):
    share = np.random.default_rng(int(torch.randint(1000, ()))).beta(2, 2)
    return share * F.cross_entropy(model(data[0]), data[1], reduction="none")


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.num = nn.Linear(8, 3), 0

    def forward(self, x):
        self.num += 1
        return self.layer(x) / self.num


@pytest.mark.parametrize("changes", [{"objective": mixed}, {"model": Counting}], ids=["mixed", "counts"])
def test_what_torch_would_compile_again_and_again_is_not_compiled(changes, tmp_path):
    """It does so eight times, and goes on eagerly then: a run that is continued would count anew."""
    built = build(recipe(optimizer=radam, **changes), RunFolder(tmp_path), COMPILED)
    assert "compiled anew in each step" in built.notes[0]


def test_a_forward_pass_that_was_compiled_and_cannot_be_is_not_continued_otherwise(tmp_path, monkeypatch):
    changed = recipe(optimizer=radam, until=8)
    for outcome in sf.steps(changed, out=tmp_path, operations=COMPILED):
        if outcome.step == 4:
            break

    def fails(*of, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("surefoot.choice.probe", fails)
    with pytest.raises(sf.OperationsError, match=r"and cannot be here: .*no compiler") as refused:
        sf.fit(changed, out=tmp_path)
    assert "they agree to rounding only" in str(refused.value)
