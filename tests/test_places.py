"""Something puts another parameter in the place of one that is trained: training goes on as if it had been
changed where it is.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, flat, recipe
from torch import nn

import surefoot as sf
from surefoot.operations import Operations

OPTIMIZERS = [sf.SGD(lr=0.1, momentum=0.9), sf.AdamW(lr=0.01)]


def in_place(module, new):
    with torch.no_grad():
        module.weight.copy_(new)


def by_another(module, new):
    module.weight = nn.Parameter(new)


class Changing(nn.Module):
    """Halves a weight in one of its forward passes."""

    def __init__(self, change, at):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.change, self.at, self.num = change, at, 0

    def forward(self, x):
        self.num += self.training and torch.is_grad_enabled()
        if self.num == self.at:
            self.num += 1
            self.change(self.first, self.first.weight.detach() * 0.5)
        return self.last(F.relu(self.first(x)))


def changing(change, at):
    return lambda: Changing(change, at)


@pytest.mark.parametrize("spec", OPTIMIZERS, ids=["sgd", "adamw"])
@pytest.mark.parametrize("micro", [None, 16])
def test_in_a_forward_pass(fit, spec, micro):
    changes = {"optimizer": spec, "batch": sf.Batch(32, micro=micro)}
    right, got, other = (
        fit(model=changing(change, at), **changes)
        for change, at in ((in_place, 5), (by_another, 5), (in_place, 99))
    )
    assert got.digest == right.digest != other.digest


def test_where_the_weight_of_a_batch_is_known_at_its_end(fit):
    def objective(model, data):
        x, y = data
        return F.cross_entropy(model(x), y, reduction="none"), 1.0 + y

    changes = {"objective": objective, "batch": sf.Batch(32, micro=16)}
    right, got = (fit(model=changing(change, 5), **changes) for change in (in_place, by_another))
    assert got.digest == right.digest


def in_the_body(change, out, most=99, **changes):
    operations = Operations(compute={"compile": changes.pop("compile", "off")})
    for outcome in sf.steps(recipe(**changes), out=out, operations=operations):
        if outcome.step in (3, 9):
            change(outcome.model[0], outcome.model[0].weight.detach() * 0.5)
        if outcome.step == most:
            break
    return sf.fit(recipe(**changes), out=out, operations=operations)


@pytest.mark.parametrize("spec", OPTIMIZERS, ids=["sgd", "adamw"])
def test_in_the_body_of_steps(tmp_path, spec):
    right = in_the_body(in_place, tmp_path / "right", optimizer=spec)
    got = in_the_body(by_another, tmp_path / "got", optimizer=spec)
    parts = in_the_body(by_another, tmp_path / "parts", most=11, optimizer=spec)
    assert got.digest == parts.digest == right.digest
    assert got.ledger == parts.ledger == right.ledger


def test_a_compiled_run_goes_on_with_eager_steps(tmp_path):
    right = in_the_body(in_place, tmp_path / "right")
    got = in_the_body(by_another, tmp_path / "got", compile="on")
    torch.testing.assert_close(flat(got.model), flat(right.model), rtol=1e-4, atol=1e-5)
    (told,) = [e for e in sf.open_run(tmp_path / "got").events() if e["kind"] == "uncompiled"]
    assert told["step"] == 4


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(F.relu(self.first(x)))


def changed(change, out, **changes):
    """The model of a run whose body changes it once."""
    for outcome in sf.steps(recipe(**changes), out=out):
        if outcome.step == 3:
            change(outcome.model)
    return outcome.model


TIED = {"model": Tied, "data": sf.Arrays(*blobs(classes=8))}


def test_tied_weights_stay_tied(tmp_path):
    def both(model):
        model.first.weight = model.last.weight = nn.Parameter(model.first.weight.detach() * 0.5)

    def untied(model):
        model.first.weight = nn.Parameter(model.first.weight.detach() * 0.5)
        model.last.weight = nn.Parameter(model.last.weight.detach() * 0.25)

    def both_in_place(model):
        in_place(model.first, model.first.weight * 0.5)

    right = changed(both_in_place, tmp_path / "right", **TIED)
    got = changed(both, tmp_path / "got", **TIED)
    assert got.first.weight is got.last.weight
    assert torch.equal(flat(got), flat(right))
    with pytest.raises(sf.StateError, match=r"last\.weight.* untied"):
        changed(untied, tmp_path / "untied", **TIED)


def test_one_that_is_frozen_is_frozen(tmp_path):
    def frozen(model):
        model[0].weight = nn.Parameter(model[0].weight.detach() * 0.5, requires_grad=False)

    def frozen_in_place(model):
        in_place(model[0], model[0].weight * 0.5)
        model[0].weight.requires_grad_(False)

    right, got = (changed(c, tmp_path / c.__name__) for c in (frozen_in_place, frozen))
    assert not got[0].weight.requires_grad
    assert torch.equal(flat(got), flat(right))


@pytest.mark.parametrize(
    ("new", "says"),
    [
        (nn.Parameter(torch.zeros(1)), r"0\.bias.*was .*\(16,\).*is .*\(1,\)"),
        (None, "none any more"),
    ],
)
def test_what_cannot_be_taken_over_is_told(tmp_path, new, says):
    with pytest.raises(sf.StateError, match=says) as caught:
        changed(lambda model: setattr(model[0], "bias", new), tmp_path / "run")
    assert "fix: Keep shape" in str(caught.value)
