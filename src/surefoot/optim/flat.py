"""Tensors end to end in one, and an optimizer's update over all weights at once.

A small network has more tensors than arithmetic: torch takes several operations for each of them, this as
many for all.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from surefoot.optim.functional import FUNCTIONS, keywords, known

_COUNTS = ("step", "mu_product")
"""What an optimizer keeps once per parameter, and not per weight."""


class Flat:
    """Copies of tensors, end to end in one, so that a norm over all of them is one operation: a third of
    the time for the ten thousand weights of a small network. Its dtype holds all of theirs exactly.

    all: 1-d. parts: its views in the tensors' shapes.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        dtype = functools.reduce(torch.promote_types, [t.dtype for t in like])
        sizes = [t.numel() for t in like]
        self.all = torch.empty(sum(sizes), dtype=dtype, device=like[0].device)
        split = zip(torch.split(self.all, sizes), like, strict=True)
        self.parts = [part.view(tensor.shape) for part, tensor in split]

    def take(self, tensors: list[Tensor]) -> None:
        """Copies them."""
        torch._foreach_copy_(self.parts, tensors)


class EndToEnd:
    """The update of one of torch's own optimizers over all weights of a group end to end: by torch's own
    function, and with the bits of torch's default, which goes tensor by tensor, since what it does is done
    to each element by itself.

    What the optimizer keeps per weight lies end to end, too, from the first such update on, and its state
    holds views of that: of which torch's compiler would make copies.

    Args:
        optimizer: one that `fits`.
        before, after: room for its parameters, in the order of its groups.
        copied: what `before` is a copy of: these parameters, unless somebody gives them other memory.
    """

    def __init__(self, optimizer: Optimizer, before: Flat, after: Flat, copied: Sequence[Tensor]) -> None:
        self._optimizer, self._before, self._after = optimizer, before, after
        self._params = _params(optimizer)
        self._at = [p.data_ptr() for p in copied]
        groups = optimizer.param_groups
        each = torch.split(after.all, [sum(p.numel() for p in group["params"]) for group in groups])
        self._groups = [_Group(optimizer, group, part) for group, part in zip(groups, each, strict=True)]

    @staticmethod
    def fits(optimizer: Optimizer) -> bool:
        """Whether there may be such updates: by a function of torch's that is not fused, of weights all in
        single or all in double precision, on a CPU.
        """
        params = _params(optimizer)
        one = len({p.dtype for p in params}) == 1 and params[0].dtype in (torch.float32, torch.float64)
        full = all(group["params"] and not group.get("fused") for group in optimizer.param_groups)
        return known(optimizer) and one and full and all(p.is_cpu for p in params)

    def step(self) -> bool:
        """Updates the parameters, of which `before` is a copy; `after` is one, too, then. False, with
        nothing done, if it is an update for torch's class: a parameter has no gradient or lies elsewhere by
        now, something that the optimizer keeps is missing, or an option is one that is seldom used.
        """
        if [p.data_ptr() for p in self._params] != self._at:
            return False
        each = list(zip(self._groups, self._optimizer.param_groups, strict=True))
        if not all(group.is_ready(options) for group, options in each):
            return False
        with torch.no_grad():
            self._after.all.copy_(self._before.all)
            for group, options in each:
                group.update(options)
            torch._foreach_copy_(self._params, self._after.parts)
        return True


class _Group:
    """A group of parameters, and what the optimizer keeps for them.

    held: each tensor of that, where it is kept.
    """

    def __init__(self, optimizer: Optimizer, options: dict[str, Any], weights: Tensor) -> None:
        self._function, self._names = FUNCTIONS[type(optimizer)]
        self._optimizer, self._weights = optimizer, weights
        self._params: list[Tensor] = options["params"]
        self._grads: list[Tensor] = []
        self._gathered: Flat | None = None
        self._kept: dict[str, Flat] = {}
        self._counts: dict[str, list[Tensor]] = {}
        self._slots: list[dict[str, Any] | None] = []
        self._held: list[tuple[dict[str, Any], str, Tensor]] = []

    def is_ready(self, options: dict[str, Any]) -> bool:
        """Whether an update is possible; what is kept lies end to end then."""
        if options["maximize"] or options["differentiable"] or isinstance(options["lr"], Tensor):
            return False
        if options.get("fused") or options.get("capturable"):
            return False
        self._grads = grads = [grad for p in self._params if (grad := p.grad) is not None]
        if len(grads) < len(self._params) or not ((self._slots and self._is_held()) or self._adopt()):
            return False
        for grad in grads:
            if grad.is_sparse:
                return False
        if not self._held and (self._function is not sgd or options["momentum"]):  # torch makes it first
            return False
        return all(len(set(map(torch.Tensor.item, counts))) == 1 for counts in self._counts.values())

    def update(self, options: dict[str, Any]) -> None:
        """Of the weights, by the gradients that `is_ready` found."""
        momentum = self._kept.get("momentum_buffer")
        if momentum is not None and self._function is sgd and _is_plain(options):  # else most is Python
            factor = torch.scalar_tensor(options["momentum"], dtype=momentum.all.dtype, device="cpu")
            momentum.all.mul_(factor)  # a number would take twice as long
            torch._foreach_add_(momentum.parts, self._grads)
            self._weights.add_(momentum.all, alpha=-options["lr"])
            return
        if self._gathered is None:
            self._gathered = Flat(self._params)
        self._gathered.take(self._grads)
        lists = [self._list(name) for name in self._names]
        how = keywords(self._function, options) | {"lr": options["lr"], "foreach": False}
        self._function([self._weights], [self._gathered.all], *lists, **how)
        for first, *others in self._counts.values():
            if others:
                torch._foreach_copy_(others, [first] * len(others))

    def _list(self, name: str) -> Sequence[Tensor | None]:
        if name in self._counts:
            return self._counts[name][:1]
        if name in self._kept:
            return [self._kept[name].all]
        return [None] if self._function is sgd else []

    def _is_held(self) -> bool:
        """Whether the optimizer keeps what `_adopt` found, or gave it."""
        state = self._optimizer.state
        for p, slots in zip(self._params, self._slots, strict=True):
            if state.get(p) is not slots:
                return False
        return all(slots.get(name) is one for slots, name, one in self._held)

    def _adopt(self) -> bool:
        """Puts what the optimizer keeps end to end, if there is as much of it for each parameter."""
        state = self._optimizer.state
        self._slots, self._held, self._kept, self._counts = [], [], {}, {}
        slots = [state[p] for p in self._params if p in state]
        for name in self._names:
            found = [one for each in slots if isinstance(one := each.get(name), Tensor) and one.is_cpu]
            if not found:
                continue
            if len(found) < len(self._params):
                return False
            if name in _COUNTS:
                self._counts[name] = found
            elif all(map(_alike, found, self._params)):
                self._kept[name] = flat = Flat(self._params)
                flat.take(found)
                found = flat.parts
            else:
                return False
            for each, one in zip(slots, found, strict=True):
                each[name] = one
                self._held.append((each, name, one))
        self._slots = [state.get(p) for p in self._params]
        return True


def _is_plain(options: dict[str, Any]) -> bool:
    """Whether SGD's update is momentum and no more."""
    more = options["weight_decay"] or options["dampening"] or options["nesterov"]
    return bool(options["momentum"]) and not more


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _params(optimizer: Optimizer) -> list[Tensor]:
    """In the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]
