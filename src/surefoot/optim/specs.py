"""Optimizers: each a frozen description with torch's own names and defaults, built over groups.

On a CPU they are, without `fused`, bit for bit what torch builds by default. ``fused=True`` is several
times faster on small tensors and rounds differently, so it belongs to the recipe. On a GPU `SGD`, `Adam`
and `AdamW` are always fused: only such a step takes the guard's go-ahead from the device, where the host
would have to wait for it otherwise.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from surefoot.errors import RecipeError
from surefoot.optim.uncompiled import without_compiler
from surefoot.protocols import OptimizerFactory, OptimizerSpec
from surefoot.types import check_fields

Groups = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum (Polyak 1964; Nesterov 1983, as in Sutskever et al.
    2013). `weight_decay` is coupled: added to the gradient.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    fused: bool = False

    def build(self, groups: Groups) -> Optimizer:
        """The torch optimizer over `groups`."""
        return torch.optim.SGD(groups, **_options(self, groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """Adam (Kingma & Ba 2015). `weight_decay` is coupled: added to the gradient; see `AdamW`."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    fused: bool = False

    def build(self, groups: Groups) -> Optimizer:
        """The torch optimizer over `groups`."""
        return torch.optim.Adam(groups, **_options(self, groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    fused: bool = False

    def build(self, groups: Groups) -> Optimizer:
        """The torch optimizer over `groups`."""
        return torch.optim.AdamW(groups, **_options(self, groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class NAdamW:
    """Adam with Nesterov momentum (Dozat 2016) and decoupled weight decay: the AlgoPerf baseline."""

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    momentum_decay: float = 4e-3

    def build(self, groups: Groups) -> Optimizer:
        """The torch optimizer over `groups`."""
        return torch.optim.NAdam(groups, decoupled_weight_decay=True, **_options(self, groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class RMSprop:
    """RMSprop (Tieleman & Hinton 2012; centred as in Graves 2013)."""

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    def build(self, groups: Groups) -> Optimizer:
        """The torch optimizer over `groups`."""
        return torch.optim.RMSprop(groups, **_options(self, groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adagrad:
    """Adagrad (Duchi et al. 2011)."""

    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    fused: bool = False

    def build(self, groups: Groups) -> Optimizer:
        """The torch optimizer over `groups`."""
        return torch.optim.Adagrad(groups, **_options(self, groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adadelta:
    """Adadelta (Zeiler 2012)."""

    lr: float = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0

    def build(self, groups: Groups) -> Optimizer:
        """The torch optimizer over `groups`."""
        return torch.optim.Adadelta(groups, **_options(self, groups))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adafactor:
    """Adafactor: factored second moments (Shazeer & Stern 2018), torch's variant."""

    lr: float = 1e-2
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0
    weight_decay: float = 0.0

    def build(self, groups: Groups) -> Optimizer:
        """The torch optimizer over `groups`."""
        return torch.optim.Adafactor(groups, **_options(self, groups))


_HALF = (torch.bfloat16, torch.float16)
_SMALL = 1 << 20


def _options(spec: Any, groups: Groups) -> dict[str, Any]:
    """Fields as torch's keywords; ``fused=False`` is left to torch's default on a CPU.

    There that default is one tensor after another. For these optimizers torch's multi-tensor code
    gives the same bits, if not in half precision, and is up to 1.8 times as fast while the model fits into
    the cache (LABBOOK.md, 2026-11-22); beyond that it is slower.
    """
    options = {k: v for k, v in asdict(spec).items() if not (k == "fused" and not v)}
    params = [p for group in groups for p in group["params"]]
    small = sum(p.numel() for p in params) <= _SMALL and params[0].device.type == "cpu"
    small &= all(p.dtype in (torch.float32, torch.float64) for p in params)
    if small and isinstance(spec, SGD | Adam | AdamW | RMSprop) and "fused" not in options:
        options["foreach"] = True
    if isinstance(spec, SGD | Adam | AdamW) and all(p.is_cuda and p.is_floating_point() for p in params):
        options["fused"] = True
    return options


def build_optimizer(spec: OptimizerSpec | OptimizerFactory, groups: Groups) -> Optimizer:
    """The optimizer of a spec or of a callable over parameter groups.

    Raises:
        RecipeError: torch refuses the options, the result is no torch optimizer, or its step needs
            to evaluate the loss again (a closure).
    """
    build: Any = getattr(spec, "build", spec)
    name = getattr(spec, "__name__", type(spec).__name__)
    if not callable(build) or (isinstance(spec, type) and hasattr(spec, "build")):
        raise RecipeError(
            f"optimizer is {spec!r}.", fix="Give a spec such as SGD(lr=0.1), or a function of groups."
        )
    if hasattr(spec, "build") and is_dataclass(spec):
        check_fields(spec, name)
    try:
        with without_compiler():
            optimizer = build(groups)
    except (TypeError, ValueError) as error:
        if len(groups) > 1 and "per-parameter options" in str(error):  # L-BFGS: say why instead
            build_optimizer(spec, [{"params": [p for group in groups for p in group["params"]]}])
        raise RecipeError(f"optimizer {name} refuses its options: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise RecipeError(
            f"optimizer {name} built a {type(optimizer).__name__}.",
            fix="Return a torch.optim.Optimizer over the given parameter groups.",
        )
    _refuse_wrong_kernel(optimizer)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise RecipeError(
            f"optimizer {type(optimizer).__name__} needs a closure.",
            why="It evaluates the loss several times in a step; here a step is one forward and "
            "backward pass over its batch.",
            fix="Use an optimizer whose step() takes no closure, such as SGD or AdamW.",
        )
    return optimizer


def _refuse_wrong_kernel(optimizer: Optimizer) -> None:
    """Torch 2.13's fused SGD over half-precision weights on a CPU: off by their size after four steps."""
    if not isinstance(optimizer, torch.optim.SGD):
        return
    fused = (p for group in optimizer.param_groups if group["fused"] for p in group["params"])
    wrong = [p for p in fused if p.dtype in _HALF and p.device.type == "cpu"]
    if wrong:
        dtype = str(wrong[0].dtype).removeprefix("torch.")
        raise RecipeError(
            f"optimizer: SGD(fused=True) over {dtype} weights on a CPU.",
            why="Torch's fused kernel computes something else there, and not just to rounding.",
            fix="Leave fused out, or keep the weights in float32.",
        )
