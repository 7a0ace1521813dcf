"""Tensors end to end in one, and an optimizer's update over all weights at once.

A small network has more tensors than arithmetic: torch takes several operations for each of them, this as
many for all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from operator import is_
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


def end_to_end(
    optimizer: Optimizer, params: Sequence[Tensor], before: Flat, after: Flat
) -> EndToEnd | None:
    """Updates at once of all parameters of an optimizer, which are among `params`; None if that is not
    possible. before: copies of `params`, taken before each update; after: room for more. Both are used if
    their order is that of the optimizer's groups.

    It takes a function of torch's that is not fused, and weights that are all in single or all in double
    precision, on a CPU, each in memory of its own. NAdam has other bits for lists of tensors, for which a
    caller may ask.
    """
    own, groups = _params(optimizer), optimizer.param_groups
    if not known(optimizer) or not all(group["params"] for group in groups):
        return None
    if any(g.get("fused") or (g.get("foreach") and type(optimizer) is torch.optim.NAdam) for g in groups):
        return None
    plain = {p.dtype for p in own} in ({torch.float32}, {torch.float64}) and all(p.is_cpu for p in own)
    if not plain or not set(own) <= set(params) or not _are_apart(own):
        return None
    same = len(own) == len(params) and all(map(is_, own, params))
    room = (before, after) if same else (Flat(own), Flat(own))
    return EndToEnd(optimizer, *room, takes=not same)


class EndToEnd:
    """The update of one of torch's own optimizers over all weights of a group end to end: by torch's own
    function, and with the bits of torch's default, which goes tensor by tensor, since what it does is done
    to each element by itself.

    What the optimizer keeps per weight lies end to end, too, from the first such update on: its tensors
    stay what they are, in memory that they share, of which torch's compiler would make copies.

    weights: of the parameters after an update, in the order of the optimizer's groups.

    Args:
        before: the same before it. takes: they are copied here.
    """

    def __init__(self, optimizer: Optimizer, before: Flat, weights: Flat, *, takes: bool) -> None:
        self.weights, self._before, self._takes, self._optimizer = weights, before, takes, optimizer
        own, groups = _params(optimizer), optimizer.param_groups
        self._params = [p.detach() for p in own]  # of which autograd knows nothing
        sizes = [sum(p.numel() for p in group["params"]) for group in groups]
        room = torch.split(before.all, sizes), torch.split(weights.all, sizes)
        self._groups = [_Group(optimizer, *each) for each in zip(groups, *room, strict=True)]
        self._state: dict[Tensor, dict[str, Any]] = {}

    def step(self) -> bool:
        """Updates the parameters. False, with nothing done, if it is an update for torch's class: a
        parameter has no gradient, groups have changed, something that the optimizer keeps is missing, or an
        option is one that is seldom used. To be called while parameters lie where they did.
        """
        groups = self._optimizer.param_groups
        if len(groups) != len(self._groups):
            return False
        each = list(zip(self._groups, groups, strict=True))
        state, before = self._optimizer.state, self._state
        same = len(state) == len(before) and all(map(is_, state, before))
        same = same and all(map(is_, state.values(), before.values()))
        self._state = {}  # unless all are ready
        if not all(group.is_ready(options, same=same) for group, options in each):
            return False
        self._state = before if same else dict(state)
        if self._takes:
            self._before.take(self._params)
        for group, options in each:
            group.update(options)
        torch._foreach_copy_(self._params, self.weights.parts)
        return True


class _Group:
    """A group of parameters, and what the optimizer keeps for them.

    slots, sizes: of each parameter, and how many things they hold. held: where each tensor of these lies.
    """

    def __init__(
        self, optimizer: Optimizer, options: dict[str, Any], before: Tensor, weights: Tensor
    ) -> None:
        self._function, self._names = FUNCTIONS[type(optimizer)]
        self._optimizer, self._before, self._weights = optimizer, before, weights
        self._params: list[Tensor] = list(options["params"])
        self._grads: list[Tensor] = []
        self._gathered: Flat | None = None
        self._kept: dict[str, Flat] = {}
        self._counts: dict[str, list[Tensor]] = {}
        self._slots: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        self._held: list[tuple[dict[str, Any], str, Tensor, int]] = []

    def is_ready(self, options: dict[str, Any], *, same: bool) -> bool:
        """Whether an update is possible; what is kept lies end to end then. same: in the same slots."""
        if options["maximize"] or options["differentiable"] or isinstance(options["lr"], Tensor):
            return False
        if options.get("fused") or options.get("capturable"):
            return False
        params = options["params"]
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return False
        self._grads = [grad for p in params if (grad := p.grad) is not None and not grad.requires_grad]
        if len(self._grads) < len(params) or not ((same and self._is_held()) or self._adopt()):
            return False
        if not self._held and (self._function is not sgd or options["momentum"]):  # torch makes it first
            return False
        return all(len(set(map(torch.Tensor.item, counts))) == 1 for counts in self._counts.values())

    def update(self, options: dict[str, Any]) -> None:
        """Of the weights before it, by the gradients that `is_ready` found."""
        momentum = self._kept.get("momentum_buffer")
        if momentum is not None and self._function is sgd and _is_plain(options):  # else most is Python
            momentum.all.mul_(_number(options["momentum"], momentum.all.dtype))  # a float takes longer
            torch._foreach_add_(momentum.parts, self._grads)
            torch.add(self._before, momentum.all, alpha=-options["lr"], out=self._weights)
            return
        self._weights.copy_(self._before)
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
        """Whether the optimizer keeps what `_adopt` found, where that put it, and nothing else."""
        return list(map(len, self._slots)) == self._sizes and all(
            slots.get(name) is one and one.data_ptr() == place for slots, name, one, place in self._held
        )

    def _adopt(self) -> bool:
        """Moves what the optimizer keeps end to end, if there is as much of it for each parameter, each in
        memory of its own.
        """
        state, before = self._optimizer.state, self._kept
        self._held, self._kept, self._counts = [], {}, {}
        self._slots = slots = [state[p] for p in self._params if p in state]
        kept = dict[str, list[Tensor]]()
        for name in self._names:
            if found := [one for each in slots if isinstance(one := each.get(name), Tensor)]:
                kept[name] = found
        if not _are_apart([one for found in kept.values() for one in found]):
            return False
        for name, found in kept.items():
            fits = name in _COUNTS or all(map(_alike, found, self._params))
            if len(found) < len(self._params) or not fits:
                return False
        for name, found in kept.items():
            if name in _COUNTS:
                self._counts[name] = found
            elif name in before and all(map(_is_at, found, before[name].parts)):
                self._kept[name] = before[name]  # a caller may have views of it
            else:
                self._kept[name] = flat = Flat(self._params)
                flat.take(found)
                for one, part in zip(found, flat.parts, strict=True):
                    one.data = part  # a caller may have taken hold of it
            self._held += [
                (each, name, one, one.data_ptr()) for each, one in zip(slots, found, strict=True)
            ]
        self._sizes = list(map(len, slots))
        return True


@functools.lru_cache(maxsize=64)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    return torch.scalar_tensor(value, dtype=dtype, device="cpu")


def _is_plain(options: dict[str, Any]) -> bool:
    """Whether SGD's update is momentum and no more."""
    more = options["weight_decay"] or options["dampening"] or options["nesterov"]
    return bool(options["momentum"]) and not more


def _are_apart(tensors: Iterable[Tensor]) -> bool:
    """Whether they are on the CPU, and no two have any memory in common."""
    end = 0
    for tensor in sorted((t for t in tensors if t.numel()), key=torch.Tensor.data_ptr):
        if tensor.data_ptr() < end or not tensor.is_cpu:
            return False
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in strides)
        end = tensor.data_ptr() + (last + 1) * tensor.element_size()
    return True


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


_is_at = torch.Tensor.is_set_to


def _params(optimizer: Optimizer) -> list[Tensor]:
    """In the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]
