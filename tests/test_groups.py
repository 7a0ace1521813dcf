"""Parameter groups by rule."""

import pytest
import torch
from conftest import blobs, flat, recipe
from torch import nn

import surefoot as sf
from surefoot.optim.groups import parameter_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.scale = nn.Parameter(torch.ones(1, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x) * self.scale)


def named(model, rules=()):
    names = {id(p): n for n, p in model.named_parameters()}
    return {g["name"]: [names[id(p)] for p in g["params"]] for g in parameter_groups(model, rules)}


def test_biases_and_norms_do_not_decay_by_default():
    groups = named(Net())
    assert groups["weights"] == ["scale", "body.0.weight", "body.2.weight", "head.weight"]
    assert set(groups["biases and norms"]) == {
        "body.0.bias", "body.1.weight", "body.1.bias", "body.2.bias", "body.3.weight", "body.3.bias",
        "head.bias",
    }  # fmt: skip


def test_every_parameter_is_in_exactly_one_group():
    model = Net()
    rules = (sf.Group("head.*", lr=0.1), sf.Group("body.0.*", freeze=True))
    groups = parameter_groups(model, rules)
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert not model.body[0].weight.requires_grad


def test_rules_do_what_they_say(fit):
    x, y = blobs(64)
    done = fit(
        model=Net,
        data=sf.Arrays(x, y),
        optimizer=sf.SGD(lr=0.1, weight_decay=0.5),
        groups=(
            sf.Group("head.*", lr=0.5, weight_decay=0.25),
            sf.Group("body.0.*", freeze=True),
        ),
        until=1,
    )
    torch.manual_seed(0)
    fresh = Net()
    assert torch.equal(done.model.body[0].weight, fresh.body[0].weight)
    table = {g["group"]: (g["lr"], g["weight_decay"]) for g in sf.open_run(done.run_dir).identity["groups"]}
    assert table == {
        "weights": (0.1, 0.5),
        "biases and norms": (0.1, 0.0),
        "head.*": (0.05, 0.25),
    }


def test_decay_everything(fit):
    changes = {"optimizer": sf.SGD(lr=0.1, weight_decay=0.1), "until": 5}
    everything = fit(**changes, groups=(sf.Group("*", weight_decay=0.1),))
    assert not torch.equal(flat(everything.model), flat(fit(**changes).model))
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ((sf.Group("haed.*"),), "'haed.*' matches no parameter"),
        ((sf.Group("head.*"), sf.Group("*.bias")), "matches both"),
        ((sf.Group("*", freeze=True),), "no parameter to train"),
    ],
)
def test_bad_rules_are_errors(rules, says):
    with pytest.raises(sf.RecipeError, match=says.replace("*", r"\*")):
        parameter_groups(Net(), rules)


def test_the_table_is_recorded(fit):
    done = fit(optimizer=sf.SGD(lr=0.1, weight_decay=0.1))
    groups = sf.open_run(done.run_dir).identity["groups"]
    assert [(g["group"], g["tensors"], g["parameters"]) for g in groups] == [
        ("weights", 2, 8 * 16 + 16 * 3),
        ("biases and norms", 2, 19),
    ]
    assert recipe().groups == ()
    assert [g["group"] for g in sf.open_run(fit().run_dir).identity["groups"]] == ["weights"]
