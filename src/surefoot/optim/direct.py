"""The step of SGD by torch's operations, without the looking around of torch's class: with a small network
that takes longer than the operations do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

_NONE: dict[str, Tensor] = {}
Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def sgd_step(optimizer: Optimizer) -> bool:
    """Takes the step, with the bits of ``optimizer.step()``. False, with nothing done, where there is more
    to look at: another optimizer or device, other than single precision, momentum that does not exist yet,
    or options that are seldom used.
    """
    if type(optimizer) is not torch.optim.SGD:
        return False
    found = []
    for group in optimizer.param_groups:
        lists = _lists(optimizer, group["params"], has_momentum=bool(group["momentum"]))
        if lists is None or group["maximize"] or group["differentiable"]:
            return False
        plain = group["foreach"] and not (group["weight_decay"] or group["dampening"] or group["nesterov"])
        if not plain and not group["fused"]:
            return False
        found.append((group, lists))
    with torch.no_grad():
        for group, (params, grads, buffers) in found:
            if not params:
                continue
            if group["fused"]:
                torch._fused_sgd_(
                    params, grads, buffers,
                    weight_decay=group["weight_decay"], momentum=group["momentum"], lr=group["lr"],
                    dampening=group["dampening"], nesterov=group["nesterov"], maximize=False,
                    is_first_step=False,
                )  # fmt: skip
                continue
            if buffers:
                momentum = torch.scalar_tensor(group["momentum"], dtype=torch.float32, device="cpu")
                torch._foreach_mul_(buffers, momentum)  # a number would take three times as long
                torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, buffers or grads, alpha=-group["lr"])
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
