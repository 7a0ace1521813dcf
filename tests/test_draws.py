"""Generators are not seeded for passes that draw from none, and nobody can tell."""

import inspect
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, mlp
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import surefoot as sf
from surefoot.draws import _LAYERS, _LOSSES, Generators, draws_nothing

STEPS = 120
LOSS = sf.supervised(F.cross_entropy)
ARRAYS = sf.Arrays(torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64))
ARGUMENTS = {
    "in_features": 6, "in1_features": 6, "in2_features": 6, "out_features": 6, "in_channels": 6,
    "out_channels": 6, "num_features": 6, "num_channels": 6, "num_groups": 2, "num_embeddings": 9,
    "embedding_dim": 6, "normalized_shape": 6, "kernel_size": 2, "output_size": 2, "padding": 1, "dim": 1,
    "upscale_factor": 1, "unflattened_size": (6, 1), "scale_factor": 2,
}  # fmt: skip


def generators():
    state = np.random.get_state()
    return random.getstate(), state[1].tobytes(), state[2:], torch.get_rng_state().tolist()


def layer(kind):
    wanted = inspect.signature(kind).parameters.values()
    given = {p.name: ARGUMENTS[p.name] for p in wanted if p.default is p.empty and p.name in ARGUMENTS}
    return kind(**given, **({"scale_factor": 2} if kind is nn.Upsample else {}))


@pytest.mark.parametrize("kind", sorted(_LAYERS, key=str))
def test_layers_that_are_known_to_draw_nothing_draw_nothing(kind):
    name, made = kind.__name__, layer(kind)
    dims = next((int(d) for d in "123" if f"{d}d" in name), 0)
    shape = (4, 6, *(6,) * dims) if dims or name != "PixelShuffle" else (4, 6, 6, 6)
    x = torch.rand(shape if name != "Upsample" else (4, 6, 6), requires_grad=name != "Embedding")
    given = [x.long()] if name == "Embedding" else [x, x] if name == "Bilinear" else [x]
    before = generators()
    made(*given).sum().backward() if x.requires_grad or name == "Embedding" else made(*given)
    assert generators() == before
    assert draws_nothing(nn.Sequential(made), LOSS, ARRAYS)


@pytest.mark.parametrize("loss", _LOSSES)
def test_losses_that_are_known_to_draw_nothing_draw_nothing(loss):
    x = torch.rand(4, 3, requires_grad=True)
    target = torch.tensor([0, 1, 2, 1]) if loss in (F.cross_entropy, F.nll_loss) else torch.rand(4, 3)
    before = generators()
    losses = sf.supervised(loss)(nn.Identity(), (x.sigmoid(), target))
    (losses[0] if isinstance(losses, tuple) else losses).sum().backward()
    assert generators() == before
    assert draws_nothing(mlp(), sf.supervised(loss), ARRAYS)


def noise(*_):
    """Draws, whatever it is called with."""
    random.random()
    np.random.random()


class Forward(nn.Sequential):
    def forward(self, x):
        return super().forward(x + random.random())


class Called(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x + random.random())


class Iterated(nn.Sequential):
    def __iter__(self):
        noise()
        return super().__iter__()


class Mixin:
    def forward(self, x):
        return super().forward(x + random.random())


class Mixed(Mixin, nn.Sequential):
    pass


class Base(nn.Module):
    def __call__(self, x):
        return super().__call__(x + random.random())


class Based(nn.Sequential, Base):
    pass


class Leaf(nn.Linear):
    def forward(self, x):
        return super().forward(x + random.random())


class Noise(nn.Module):
    def forward(self, x):
        return x + random.random()


class Weights(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        noise()
        return super().__torch_function__(func, types, args, kwargs or {})


def with_hook(register, of=0):
    model = mlp()
    getattr(model[of], register)(noise)
    return model


def with_param_hook(register):
    model = mlp()
    getattr(model[0].weight, register)(noise)
    return model


def patched(name, value=noise):
    model = mlp()
    setattr(model[0], name, value)
    return model


def with_node_hook():
    model = mlp()
    weight = model[0].weight
    model.nodes = [weight.expand_as(weight).grad_fn.next_functions[0][0]]
    model.nodes[0].register_prehook(noise)
    return model


def parametrized():
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", Noise())
    return model


def subclassed():
    model = mlp()
    model[0].bias = nn.Parameter(model[0].bias.detach().as_subclass(Weights))
    return model


def attribute():
    model = mlp()
    del model[0].bias
    model[0].bias = torch.zeros(16).as_subclass(Weights)
    return model


THEIRS = {
    "own forward": lambda: Forward(*mlp()),
    "own call": lambda: Called(*mlp()),
    "own iteration": lambda: Iterated(*mlp()),
    "mixed in": lambda: Mixed(*mlp()),
    "own base": lambda: Based(*mlp()),
    "own layer": lambda: nn.Sequential(Leaf(8, 3)),
    "own module": lambda: nn.Sequential(Noise(), *mlp()),
    "module alone": Noise,
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), *mlp()),
    "rrelu": lambda: nn.Sequential(nn.RReLU(), *mlp()),
    "forward patched": lambda: patched("forward", lambda x: F.linear(x, torch.rand(16, 8))),
    "forward hook": lambda: with_hook("register_forward_hook"),
    "forward pre-hook": lambda: with_hook("register_forward_pre_hook"),
    "backward hook": lambda: with_hook("register_full_backward_hook", 2),
    "backward pre-hook": lambda: with_hook("register_full_backward_pre_hook", 2),
    "gradient hook": lambda: with_param_hook("register_hook"),
    "accumulation hook": lambda: with_param_hook("register_post_accumulate_grad_hook"),
    "hook on a node": with_node_hook,
    "parametrized": parametrized,
    "weight norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 3))),
    "subclass of Tensor": subclassed,
    "subclass of Tensor as an attribute": attribute,
    "many layers": lambda: nn.Sequential(*[nn.Identity() for _ in range(64)], *mlp()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", THEIRS)
def test_a_model_in_which_callers_code_runs_may_draw(what):
    assert not draws_nothing(THEIRS[what](), LOSS, ARRAYS)


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_whatever_else_of_the_callers_runs_may_draw():
    model = mlp()
    assert draws_nothing(model, LOSS, ARRAYS)
    for mode in (Function(), Dispatch(), torch.autograd.graph.saved_tensors_hooks(noise, noise)):
        with mode:
            assert not draws_nothing(model, LOSS, ARRAYS)
    handle = nn.modules.module.register_module_forward_hook(noise)
    assert not draws_nothing(model, LOSS, ARRAYS)
    handle.remove()
    assert draws_nothing(model, LOSS, ARRAYS)
    assert not draws_nothing(model, lambda model, data: F.mse_loss(*data), ARRAYS)
    assert not draws_nothing(model, sf.supervised(lambda x, y, reduction: noise()), ARRAYS)
    assert not draws_nothing(model, LOSS, sf.Arrays(torch.zeros(4, 8).as_subclass(Weights), torch.zeros(4)))
    patched = sf.Arrays(torch.zeros(4, 8), torch.zeros(4))
    patched.nest = noise
    assert not draws_nothing(model, LOSS, patched)
    weighted = sf.supervised(F.cross_entropy, weight=torch.ones(3).as_subclass(Weights))
    assert not draws_nothing(model, weighted, ARRAYS)
    changed = sf.supervised(F.cross_entropy)
    changed._elements = noise
    assert not draws_nothing(model, changed, ARRAYS)


@pytest.mark.parametrize(
    ("of", "name"),
    [(nn.Linear, "forward"), (nn.Sequential, "forward"), (nn.Module, "_call_impl"), (F, "linear")],
)
def test_what_somebody_put_in_the_place_of_torchs_code_may_draw(monkeypatch, of, name):
    was = getattr(of, name)
    monkeypatch.setattr(of, name, lambda *args: was(*args))
    assert not draws_nothing(mlp(), LOSS, ARRAYS)


class Plain(nn.Sequential):
    """Layers in a class of their own, as people write it."""

    width = 16

    def __init__(self):
        super().__init__(nn.Linear(8, self.width), nn.ReLU(), nn.Linear(self.width, 3))

    @staticmethod
    def data():
        return blobs()


@pytest.fixture
def seeds(monkeypatch):
    """What Python's generator was seeded by."""
    found, seed = [], random.seed
    monkeypatch.setattr(random, "seed", lambda value: found.append(value) or seed(value))
    return found


@pytest.mark.parametrize("model", [mlp, Plain])
def test_they_are_not_seeded_for_passes_that_draw_nothing(fit, seeds, model):
    fit(model=model, until=STEPS)
    assert len(seeds) < STEPS / 2


class Transform:
    def __call__(self, grads, norm):
        for grad in grads:
            grad += 1e-3 * np.random.normal() + 1e-3 * random.random()


class Optimizer(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad += 1e-3 * random.random()
        super().step(closure)


class Rows(sf.Arrays):
    def nest(self, parts):
        return (parts[0] + 1e-3 * random.random(), *parts[1:])


def test_a_step_in_the_place_of_torchs_may_draw(fit, seeds, monkeypatch):
    was = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: was(self, closure))
    fit(until=STEPS)
    assert len(seeds) >= STEPS


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient": (Transform(),)},
        {"optimizer": lambda groups: Optimizer(groups, lr=0.1)},
        {"model": lambda: Forward(*mlp())},
        {"model": lambda: nn.Sequential(nn.Dropout(0.1), *mlp())},
        {"data": Rows(*blobs())},
    ],
    ids=["transform", "optimizer", "model", "dropout", "source"],
)
def test_they_are_seeded_where_anything_may_draw(fit, seeds, monkeypatch, changes):
    changes = {"until": STEPS} | changes
    result = fit(**changes)
    assert len(seeds) >= STEPS
    never = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(Generators, "rest", never, raising=False)
    assert fit(**changes).digest == result.digest


def test_validation_after_steps_that_draw_nothing_is_seeded(fit):
    found = []

    def drawn(model, data):
        found.append((random.random(), np.random.random(), torch.rand(1).item()))
        return torch.zeros(len(data[1]))

    validation = sf.Validation(sf.Arrays(*blobs()), every=30, batch=256, metrics={"drawn": drawn})
    fit(validation=validation, until=STEPS)
    assert len(found) > 4
    assert len(set(found)) == 1


def test_a_metric_that_hooks_into_the_model_is_noticed(fit, monkeypatch):
    """After validation it is looked again."""

    calls = []

    def hooks(model, data):
        calls.append(model)
        if len(calls) == 20:
            model[0].register_forward_hook(lambda module, given, found: found + 0.1 * random.random())
        return torch.zeros(len(data[1]))

    def digest():
        calls.clear()
        validation = sf.Validation(sf.Arrays(*blobs()), every=30, metrics={"hooks": hooks})
        return fit(validation=validation, until=STEPS).digest

    found = digest()
    never = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(Generators, "rest", never, raising=False)
    assert digest() == found
