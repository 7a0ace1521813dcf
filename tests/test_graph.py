"""The compiled step equals the eager one to rounding, and itself to the bit however it is interrupted."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, blobs, flat, surefoot
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch.utils.checkpoint import checkpoint

import surefoot as sf
from surefoot import calm, course, heal, train
from surefoot.api import result, run_steps
from surefoot.build import build
from surefoot.compiled import Compiled
from surefoot.heal import EVERY, SELDOM
from surefoot.operations import Operations
from surefoot.record.folder import RunFolder
from surefoot.stopping import Budget

COMPILED = Operations(compute={"compile": "on"}, checkpoint={"every": 7}, progress="off")
EAGER = Operations(compute={"compile": "off"}, progress="off")
CE = sf.supervised(F.cross_entropy)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def large():
    return nn.Sequential(nn.Linear(8, 1500), nn.Linear(1500, 1500), nn.Linear(1500, 3))


class Tied(nn.Module):
    """Two layers share a weight, one is frozen, and one is never used."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight
        self.frozen, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.out(self.b(torch.tanh(self.frozen(self.a(x)))))


class Attending(nn.Module):
    """Attention between the features, in training with dropout."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(1, 12), nn.Linear(32, 3)

    def forward(self, x):
        q, k, v = self.inner(x[:, None, :, None]).split(4, dim=-1)
        return self.outer(F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).flatten(1))


def test_a_state_that_does_not_fit_is_not_kept_for_remedies(tmp_path, monkeypatch):
    monkeypatch.setattr(heal, "_free_bytes", lambda device: 0)
    _, built = run(diverging(), tmp_path / "run", Operations(compute={"compile": "on"}, progress="off"))
    assert any(e["kind"] == "rolled_back" for e in sf.open_run(tmp_path / "run").events())
    assert not built.run.healer.memory


def test_layers_that_were_told_of_are_not_told_of_again_after_going_back(tmp_path, monkeypatch):
    schedule = sf.constant(over=750) >> sf.constant(over=3) * 1e9 >> sf.constant()
    told = []
    for seldom in (SELDOM, EVERY):
        monkeypatch.setattr(train, "SELDOM", seldom)
        changed = recipe(**EVENTFUL["vanishing"] | {"until": 1300, "schedule": schedule, "gradient": ()})
        out = tmp_path / str(seldom)
        _, _, events, guard = calmly(changed, out, monkeypatch, calm=True, checkpoint={"every": 5000})
        told.append(([(e["kind"], e.get("step"), e.get("layer")) for e in events], guard["layers"]))
    np.testing.assert_equal(*told)
    kinds = [kind for kind, *_ in told[0][0]]
    assert {"rolled_back", "layer"} <= set(kinds)
    layers = [layer for kind, _, layer in told[0][0] if kind == "layer"]
    assert len(layers) == len(set(layers))
