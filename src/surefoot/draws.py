"""The random generators that passes draw from, and passes that draw from none."""

from __future__ import annotations

import itertools
import os
import random
import sys
from pathlib import Path
from types import FunctionType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.module import _has_any_global_hook

from surefoot.data.sources import Arrays
from surefoot.optim.objective import ClassWeighted, Supervised
from surefoot.unchanged import HOOKS, hooked

_MOST = 64
"""Modules: beside passes of a model that has more, seeding takes no time."""
_LAYERS = {
    nn.Linear, nn.Bilinear, nn.Embedding, nn.Identity, nn.Flatten, nn.Unflatten,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.PixelShuffle, nn.ZeroPad1d, nn.ZeroPad2d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Softmax, nn.LogSoftmax,
}  # fmt: skip
_LOSSES = (
    F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss,
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
)  # fmt: skip
_FUNCTIONS = {name: value for name, value in vars(F).items() if callable(value)}
_METHODS = ("__call__", "_call_impl", "__getattr__", "forward")
_OF_A_CLASS = {
    "__init__", "__module__", "__doc__", "__annotations__", "__firstlineno__", "__static_attributes__"
}  # fmt: skip
_NAMES = set(dir(nn.Sequential)) - _OF_A_CLASS
_PLAIN = {Tensor, nn.Parameter, bool, int, float, type(None)}
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


class Generators:
    """Seeds Python's, numpy's and torch's generators, and that of the device if it is another; none while
    they `rest`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.rest = device, False

    def seed(self, seed: int) -> None:
        """Not by `torch.manual_seed`, which takes 0.3 ms, since it visits every kind of accelerator."""
        if self.rest:
            return
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index or 0].manual_seed(seed)


def draws_nothing(model: nn.Module, objective: object, source: object) -> bool:
    """Whether passes are torch's code alone, none of which draws random numbers: known layers, in
    `nn.Sequential`, a known loss function, arrays, and nothing of the caller's that is called in between.
    """
    modules = list(itertools.islice(model.modules(), _MOST + 1))
    return (
        len(modules) <= _MOST
        and all(map(_is_known, modules))
        and _is_known_loss(objective)
        and _is_plain(source)
        and vars(F).items() >= _FUNCTIONS.items()
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def _is_known(module: nn.Module) -> bool:
    own, kind = vars(module), type(module)
    if kind not in _LAYERS and not _is_sequential(kind):
        return False
    if not all(_is_torchs(getattr(kind, name)) for name in _METHODS):
        return False
    if any(map(callable, own.values())) or any(own[hooks] for hooks in HOOKS):
        return False
    held = (*own.values(), *own["_parameters"].values(), *own["_buffers"].values())
    tensors = [value for value in held if isinstance(value, Tensor)]
    if not {type(tensor) for tensor in tensors} <= _PLAIN:
        return False
    return not any(hooked(tensor) or (tensor.requires_grad and _is_watched(tensor)) for tensor in tensors)


def _is_watched(param: Tensor) -> bool:
    """Whether somebody holds the node in which its gradient arrives, on which a hook may hang unseen."""
    return not param.is_leaf or _references(get_gradient_edge(param).node) > _references(object())


def _references(one: object) -> int:
    return sys.getrefcount(one)


def _is_sequential(kind: type) -> bool:
    """Whether it goes forward as `nn.Sequential` does."""
    others = [one for one in kind.__mro__ if one not in (nn.Sequential, nn.Module, object)]
    return issubclass(kind, nn.Sequential) and not any(vars(one).keys() & _NAMES for one in others)


def _is_torchs(function: object) -> bool:
    return isinstance(function, FunctionType) and function.__code__.co_filename.startswith(_TORCH)


def _is_known_loss(objective: object) -> bool:
    if not isinstance(objective, Supervised) or type(objective) not in (Supervised, ClassWeighted):
        return False
    if vars(objective).keys() != {"function", "options"} or not _is_torchs(objective.function):
        return False
    known = any(objective.function is loss for loss in _LOSSES)
    return known and {type(value) for value in objective.options.values()} <= _PLAIN


def _is_plain(source: object) -> bool:
    if type(source) is not Arrays or any(map(callable, vars(source).values())):
        return False
    return {type(array) for array in source.arrays()} == {Tensor}
