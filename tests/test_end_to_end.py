"""An update of all weights at once is that of torch's optimizer, to the bit."""

import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
from conftest import blobs, recipe
from hypothesis import example, given, settings
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
SHAPES = [(3, 5), (7,), (16, 33), (), (1,), (0, 4), (129,), (5, 5)]
TRICKS = [
    "none", "none", "none", "a gap", "all gaps", "a rate", "decay", "loading", "another slot",
    "other slots", "other memory", "watched", "maximize", "zeroed state", "other state memory",
    "transposed", "other order", "one less", "shared memory", "momentum",
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
@example(  # a thing more is kept from some update on
    kind=(torch.optim.RMSprop, {}),
    groups=[([(3, 5)], 0.0)],
    dtype=torch.float32,
    tricks=["none", "none", "momentum", "none"],
    seed=0,
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
    grabbed = dict[int, list[torch.Tensor]]()  # what a caller took hold of after the first update
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
        if trick == "loading" and "one less" not in tricks:  # which torch cannot
            for optimizer in (ours, torchs):
                optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
        for optimizer, p in zip((ours, torchs), pairs[seed % len(pairs)], strict=True):
            kept = {k: v for k, v in optimizer.state.get(p, {}).items() if isinstance(v, torch.Tensor)}
            if trick == "another slot":
                optimizer.state[p] |= {name: value.clone() for name, value in kept.items()}
            if trick == "other slots" and p in optimizer.state:
                optimizer.state[p] = {name: value.clone() for name, value in kept.items()}
            if trick == "other memory":
                p.data = p.data.clone()
            if trick == "other state memory":
                for value in kept.values():
                    value.data = value.data.clone()
        if trick == "zeroed state":
            for value in [v for values in grabbed.values() for v in values]:
                value.zero_()
        if trick == "transposed" and pairs[0][0].shape == (5, 5):
            for p in pairs[0]:
                p.data = p.data.t()
        alike = len(pairs) > 1 and pairs[0][0].shape == pairs[1][0].shape
        if trick == "shared memory" and alike and "foreach" not in options:  # torch's two ways differ then
            pairs[0][0].data, pairs[0][1].data = pairs[1][0].data, pairs[1][1].data
        if trick == "momentum" and cls in (torch.optim.SGD, torch.optim.RMSprop):
            for optimizer in (ours, torchs):
                group = optimizer.param_groups[0]
                group["momentum"] = 0.7
                for p in group["params"] if cls is torch.optim.RMSprop else ():
                    if p in optimizer.state:
                        optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        if trick in ("other order", "one less"):
            for optimizer in (ours, torchs):
                params = optimizer.param_groups[0]["params"]
                if trick == "other order":
                    params.reverse()
                elif len(params) > 1:
                    optimizer.param_groups[0]["params"] = params[1:]
        norm = torch.tensor(1e30 if trick == "watched" else 1.0)
        for group in torchs.param_groups:
            group["lr"] = LR * rate
        torchs.step()
        _, applied = updater.apply(
            torch.tensor(True), step=step, multiplier=rate, base=[LR] * len(groups), grad_norm=norm
        )
        assert applied
        if step == 0:
            for i, optimizer in enumerate((ours, torchs)):
                values = [value for slots in optimizer.state.values() for value in slots.values()]
                grabbed[i] = [v for v in values if isinstance(v, torch.Tensor) and v.ndim]
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


def test_what_lies_in_place_is_not_moved_again():
    """A caller may have views of it; here he adds something of his own."""
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=LR, momentum=0.9)
    updater = Updater(optimizer, [param], measure_every=1)
    updater.go_end_to_end()
    places = []
    for step in range(4):
        param.grad = torch.ones(3)
        applied = torch.tensor(True)
        updater.apply(applied, step=step, multiplier=1.0, base=[LR], grad_norm=torch.tensor(1.0))
        optimizer.state[param][f"mine {step}"] = step
        places.append(optimizer.state[param]["momentum_buffer"].data_ptr())
    assert places[0] != places[1] == places[2] == places[3]


def linear(*, shares=False):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    if shares:
        model[2].weight.data = model[0].weight.data
    return model


def of_a_part(groups):
    return torch.optim.AdamW([{**groups[0], "params": groups[0]["params"][:1]}, *groups[1:]], lr=0.01)


def twice(groups):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.optim.SGD([{**groups[0], "params": groups[0]["params"] * 2}], lr=0.01, momentum=0.9)


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        (linear, of_a_part),
        (linear, twice),
        (partial(linear, shares=True), sf.SGD(lr=0.01, momentum=0.9)),
        (partial(linear, shares=True), sf.AdamW(lr=0.01)),
        (linear, lambda groups: torch.optim.NAdam(groups, lr=0.01, foreach=True)),
        (linear, sf.SGD(lr=0.01, momentum=0.9, fused=True)),
        (linear, sf.Adafactor(lr=0.01)),
    ],
)
def test_what_is_left_to_torchs_class(tmp_path, monkeypatch, model, optimizer):
    """Weights that are not all of the optimizer's, or twice, or share memory; what has other bits."""
    x, y = blobs(64 * 8, classes=4)
    changed = recipe(model=model, data=sf.Arrays(x[:, :4], y), optimizer=optimizer, until=40)
    done = sf.fit(changed, out=tmp_path / "run")
    monkeypatch.setattr(Updater, "go_end_to_end", lambda self: None)
    assert done.digest == sf.fit(changed, out=tmp_path / "by class").digest


def test_rows_are_those_of_torchs_class(tmp_path, monkeypatch):
    """With two groups, whose order is not the model's."""
    changed = recipe(optimizer=sf.AdamW(lr=0.01), until=40)
    logs = [sf.open_run(sf.fit(changed, out=tmp_path / "run").run_dir).log()]
    monkeypatch.setattr(Updater, "go_end_to_end", lambda self: None)
    logs.append(sf.open_run(sf.fit(changed, out=tmp_path / "by class").run_dir).log())
    for name in ("loss", "grad_norm", "update_ratio"):
        assert logs[0][name].tobytes() == logs[1][name].tobytes()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("lr", [0.5, 1e30])
def test_a_parameter_is_measured_and_put_back_where_it_is(at_once, moves, lr):
    """Though it is given other memory, and where the update overflows."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9)
    updater = Updater(optimizer, params, measure_every=1)
    if at_once:
        updater.go_end_to_end()
    for step, rate in enumerate((0.1, 0.1, lr, 0.1)):
        if step == 2 and moves:
            params[0].data = torch.full((4,), 2.0)
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad, kept = torch.full_like(p, 1e20 if rate > 1 else 1.0), optimizer.state.get(p)
            if kept and kept["momentum_buffer"].shape != p.shape:
                del optimizer.state[p]
        momenta = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
        ratio, applied = updater.apply(
            torch.tensor(True), step=step, multiplier=1.0, base=[rate], grad_norm=torch.tensor(3.0)
        )
        moved = torch.cat([p.detach() - b for p, b in zip(params, before, strict=True)])
        assert applied.item() == (rate < 1)
        assert ratio == (moved.norm() / torch.cat(before).norm()).item()
        assert moved.any() == applied
        if not applied:
            kept = [s["momentum_buffer"] for s in optimizer.state.values()]
            assert all(map(torch.equal, kept, momenta))
    assert updater.weights_are_finite()
    params[0].data = torch.tensor([torch.nan])
    assert not updater.weights_are_finite()
