"""An update of all weights at once is that of torch's optimizer, to the bit."""

from copy import deepcopy

import pytest
import torch
from conftest import blobs, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surefoot as sf
from surefoot.operations import Operations
from surefoot.optim.flat import EndToEnd
from surefoot.optim.update import Updater

LR = 0.01
KINDS = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"amsgrad": True, "foreach": True}),
    (torch.optim.AdamW, {"betas": (0.8, 0.99)}),
    (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    (torch.optim.RMSprop, {}),
    (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    (torch.optim.Adagrad, {"lr_decay": 0.1}),
    (torch.optim.Adadelta, {}),
]
SHAPES = [(3, 5), (7,), (16, 33), (), (1,), (0, 4), (129,)]
TRICKS = [
    "none", "none", "none", "a gap", "all gaps", "a rate", "decay", "loading", "another slot",
    "other slots", "other memory", "watched", "maximize",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(
        st.tuples(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4), st.sampled_from([0.0, 0.1])),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([torch.float32, torch.float32, torch.float64]),
    st.lists(st.sampled_from(TRICKS), min_size=2, max_size=8),
    st.integers(0, 2**31),
)
def test_whatever_happens_between_updates(kind, groups, dtype, tricks, seed):
    cls, options = kind
    generator = torch.Generator().manual_seed(seed)

    def random(like, scale=1.0):
        return torch.randn(like, generator=generator).to(dtype) * scale

    values = [([random(shape) for shape in shapes], decay) for shapes, decay in groups]

    def build_one(**more):
        side = [
            {"params": [nn.Parameter(v.clone()) for v in vs], "weight_decay": decay} for vs, decay in values
        ]
        return cls(side, lr=LR, **options | more)

    ours, torchs = build_one(), build_one(foreach=False)
    updater = Updater(ours, parameters(ours), measure_every=1)
    updater.go_end_to_end()
    rate, num = 1.0, 0
    step_at_once = updater._end_to_end.step

    def counted():
        nonlocal num
        done = step_at_once()
        num += done
        return done

    updater._end_to_end.step = counted
    for step, trick in enumerate(tricks):
        pairs = list(zip(parameters(ours), parameters(torchs), strict=True))
        for i, (p, q) in enumerate(pairs):
            gap = trick == "all gaps" or (trick == "a gap" and i == seed % len(pairs))
            p.grad = None if gap else random(p.shape, 0.3)
            q.grad = None if gap else p.grad.clone()
        if trick == "a rate":
            rate *= 0.5
        if trick in ("decay", "maximize"):
            for group in (ours.param_groups[0], torchs.param_groups[0]):
                group |= {"weight_decay": 0.2} if trick == "decay" else {"maximize": True}
        if trick == "loading":
            for optimizer in (ours, torchs):
                optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
        p = pairs[seed % len(pairs)][0]
        if trick == "another slot":
            for name, value in ours.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):
                    ours.state[p][name] = value.clone()
        if trick == "other slots" and p in ours.state:
            ours.state[p] = {k: v.clone() for k, v in ours.state[p].items() if isinstance(v, torch.Tensor)}
        if trick == "other memory":
            p.data = p.data.clone()
        norm = torch.tensor(1e30 if trick == "watched" else 1.0)
        for group in torchs.param_groups:
            group["lr"] = LR * rate
        torchs.step()
        _, applied = updater.apply(
            torch.tensor(True), step=step, multiplier=rate, base=[LR] * len(groups), grad_norm=norm
        )
        assert applied
        for p, q in pairs:
            assert torch.equal(p, q), (step, trick)
            kept, like = ours.state.get(p, {}), torchs.state.get(q, {})
            names = [{k for k, v in slots.items() if v is not None} for slots in (kept, like)]
            assert names[0] == names[1]
            for name in names[0]:
                assert torch.equal(kept[name], like[name]), (step, trick, name)
    if set(tricks) <= {"none", "a rate", "decay", "loading", "another slot", "other slots"}:
        begins = cls is not torch.optim.Adagrad and (cls is not torch.optim.SGD or "momentum" in options)
        assert num == len(tricks) - begins  # what is kept is made by torch's class


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("mode", ["off", "on"])
def test_no_step_of_a_compiled_run_is_taken_so(tmp_path, monkeypatch, mode):
    """Of tensors that share their memory torch's compiler would make copies in each step."""
    taken = []
    real = EndToEnd.step
    monkeypatch.setattr(EndToEnd, "step", lambda self: taken.append(real(self)) or taken[-1])
    x, y = blobs(64 * 8)
    changed = recipe(data=sf.Arrays(x, y), optimizer=sf.AdamW(lr=0.01), batch=sf.Batch(64), until=40)
    operations = Operations(progress="off", compute={"compile": mode})
    sf.fit(changed, out=tmp_path / "run", operations=operations)
    assert sum(taken) == (39 if mode == "off" else 0)
