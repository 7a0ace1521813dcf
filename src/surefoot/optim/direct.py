"""The fused step of SGD on a CPU, without the looking around of torch's class: with a small network that
takes longer than the operation does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

_NONE: dict[str, Tensor] = {}
Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def fused_sgd_step(optimizer: Optimizer) -> bool:
    """Takes the step, with the bits of ``optimizer.step()``. False, with nothing done, where there is more
    to look at: another optimizer or device, other than single precision, momentum that does not exist yet,
    or a group that is not fused.
    """
    if type(optimizer) is not torch.optim.SGD:
        return False
    found = []
    for group in optimizer.param_groups:
        if not group["fused"] or group["maximize"] or group["differentiable"]:
            return False
        lists = _lists(optimizer, group["params"], has_momentum=bool(group["momentum"]))
        if lists is None:
            return False
        found.append((group, lists))
    with torch.no_grad():
        for group, (params, grads, buffers) in found:
            if params:
                torch._fused_sgd_(
                    params, grads, buffers,
                    weight_decay=group["weight_decay"], momentum=group["momentum"], lr=group["lr"],
                    dampening=group["dampening"], nesterov=group["nesterov"], maximize=False,
                    is_first_step=False,
                )  # fmt: skip
    return True


def _lists(optimizer: Optimizer, params: list[Tensor], *, has_momentum: bool) -> Lists | None:
    """The parameters that have a gradient, these, and their momentum, if there is any."""
    moved, grads, buffers = list[Tensor](), list[Tensor](), list[Tensor]()
    state = optimizer.state
    for p in params:
        grad = p.grad
        if grad is None:
            continue
        if not p.is_cpu or p.dtype is not torch.float32 or grad.is_sparse:
            return None
        if has_momentum:
            buffer = state.get(p, _NONE).get("momentum_buffer")
            if buffer is None or buffer.dtype is not torch.float32:
                return None
            buffers.append(buffer)
        moved.append(p)
        grads.append(grad)
    return moved, grads, buffers
