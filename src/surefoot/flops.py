"""How much arithmetic there is in a forward pass, by torch's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from surefoot.compiled import forget_failed_traces
from surefoot.errors import SurefootError
from surefoot.passes import losses_of
from surefoot.trials import Trial, first_line


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations: total, and most, of a single kernel. Torch's own counter hooks into
    autograd to tell modules apart, and so fails where a forward pass takes a derivative, as a gradient
    penalty does.
    """

    supports_higher_order_operators = True  # that is, it is asked about them

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if isinstance(func, HigherOrderOperator):
            raise NotImplementedError(f"what torch does in {func}")
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            num = count(*args, **(kwargs or {}), out_val=result)
            self.total, self.most = self.total + num, max(self.most, num)
        return result


def count(trial: Trial) -> Flops | str:
    """The operations of a forward pass; or why they cannot be counted."""
    counter = Flops()
    try:
        with counter:
            losses_of(trial.parts, trial.batch(0))
    except SurefootError:
        raise
    except Exception as error:  # if it is the model's, the first step will tell
        trial.parts.buffers.settle(torch.tensor(False), on_host=True)
        forget_failed_traces()
        return first_line(error)
    return counter
