"""How much there is to do in a forward pass: for rules that choose how steps are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from surefoot.compiled import forget_failed_traces
from surefoot.errors import SurefootError
from surefoot.passes import losses_of
from surefoot.trials import Trial, first_line


def _of_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    num: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return num


def _of_its_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    shapes = grad.shape, query.shape, key.shape, value.shape
    num: int = sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
    return num


_MISSING: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_its_backward,
}
"""In torch's table (2.13)."""


class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations: total, and most, of a single kernel; and elements, those of the
    largest tensor that one reads or writes, all of it or not: torch's table has no entry for what takes but
    a few operations for each. Torch's own counter hooks into autograd to tell modules apart, and so fails
    where a forward pass takes a derivative, as a gradient penalty does.
    """

    supports_higher_order_operators = True  # that is, it is asked about them

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.most = self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if isinstance(func, HigherOrderOperator):
            raise NotImplementedError(f"what torch does in {func}")
        options = kwargs or {}
        result = func(*args, **options)
        if not func.is_view:
            sizes = (
                leaf.numel() for leaf in tree_leaves((args, options, result)) if isinstance(leaf, Tensor)
            )
            self.elements = max([self.elements, *sizes])
        if func._overloadpacket in _MISSING:
            num = _MISSING[func._overloadpacket](*args, **options)
        elif func._overloadpacket in flop_registry:
            num = flop_registry[func._overloadpacket](*args, **options, out_val=result)
        else:
            return result
        self.total, self.most = self.total + num, max(self.most, num)
        return result


def count(trial: Trial) -> Work | str:
    """What a forward pass does with the first batch; or why that cannot be counted."""
    work, batch = Work(), trial.batch(0)
    try:
        with work:
            losses_of(trial.parts, batch)
    except SurefootError:
        raise
    except Exception as error:  # if it is the model's, the first step will tell
        trial.parts.buffers.settle(torch.tensor(False), on_host=True)
        forget_failed_traces()
        return first_line(error)
    return work
