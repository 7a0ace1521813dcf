"""Precision: the dtype of the forward pass, and dynamic loss scaling for fp16."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from surefoot.errors import RecipeError

PrecisionName = Literal["fp32", "bf16", "fp16"]
_AS_IT_IS: AbstractContextManager[Any] = nullcontext()
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast for the forward pass; weights, gradients and optimizer state keep the model's dtype.

    ``fp32`` casts nothing: a model in float64 trains in float64. dtype: of forward passes, if another.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        if name not in get_args(PrecisionName):
            raise RecipeError(
                f"precision = {name!r} is unknown.", fix=f"Use one of {get_args(PrecisionName)}."
            )
        self.name = name
        self.scale = LossScale(device) if name == "fp16" else None
        self._device = device.type
        self.dtype = _DTYPES.get(name)

    def forward(self) -> AbstractContextManager[Any]:
        """The context of a forward pass and its losses."""
        if self.dtype is None:
            return _AS_IT_IS
        return torch.autocast(self._device, dtype=self.dtype)

    def attention(self) -> AbstractContextManager[Any]:
        """A second context, within that of `forward`, for backward passes too: they may take forward passes
        again. (As one context torch could not trace them.)
        """
        if self.dtype is None or self._device != "cpu":
            return _AS_IT_IS
        return _AttentionInSingle(self.dtype)

    def evaluation(self) -> AbstractContextManager[Any]:
        """Both, for passes that nothing traces."""
        both = ExitStack()
        both.enter_context(self.forward())
        both.enter_context(self.attention())
        return both


class _AttentionInSingle(TorchFunctionMode):
    """`scaled_dot_product_attention` in fp32, its result in the dtype of autocast: on CPUs torch's backward
    pass of it is slower in half precision than in single. `nn.MultiheadAttention` calls it out of reach.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            found = func(*map(_single, args), **{name: _single(a) for name, a in kwargs.items()})
        return found if found.dtype == torch.float64 else found.to(self._dtype)


def _single(argument: Any) -> Any:
    half = isinstance(argument, Tensor) and argument.dtype in (torch.bfloat16, torch.float16)
    return argument.float() if half else argument


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018): tensors only, always the same two, so nothing waits
    for the device.

    The loss is multiplied by `scale` before the backward pass. An update whose gradients are not
    finite halves it; 2,000 finite ones in a row double it.
    """

    GROWTH_INTERVAL = 2000
    INITIAL = 65536.0
    MOST = 2.0**24
    LEAST = 2.0**-14

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(self.INITIAL, device=device)
        self.num_good = torch.tensor(0, device=device, dtype=torch.int64)

    def unscale(self, grads: Sequence[Tensor]) -> None:
        """Divides gradients by the scale, in place; exact, since the scale is a power of two."""
        torch._foreach_mul_(list(grads), 1.0 / self.scale)

    def adjust(self, permitted: Tensor) -> None:
        """After an update that was permitted or not (bool, 0-d)."""
        good = torch.where(permitted, self.num_good + 1, 0)
        grow = good >= self.GROWTH_INTERVAL
        grown = torch.where(grow, self.scale * 2, self.scale)
        self.scale.copy_(torch.where(permitted, grown, self.scale / 2).clamp(self.LEAST, self.MOST))
        self.num_good.copy_(torch.where(grow, 0, good))

    def state_dict(self) -> dict[str, float]:
        """JSON."""
        return {"scale": float(self.scale), "num_good": int(self.num_good)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Puts back what `state_dict` gave."""
        self.scale.fill_(state["scale"])
        self.num_good.fill_(int(state["num_good"]))
