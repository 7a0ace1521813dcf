"""Whether what a trace or a capture took for constant is as it was."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from operator import is_
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))
_LISTS = (list, tuple, deque)
_DEPTH, _MOST = 5, 256
"""How far objects are followed from a module or function, and up to what length collections."""


class Unchanged:
    """Whether a model, and other objects, are what they were: their attributes, what these hold, and what
    functions close over, read as globals and are bound to (plain values by value, others by identity,
    collections by length, too); the tensors of the model, and hooks on it.
    """

    def __init__(self, model: nn.Module, others: Iterable[object]) -> None:
        self._names: list[tuple[dict[str, Any], str]] = []
        self._sized: list[Any] = []
        self._lists: list[Any] = []
        self._cells: list[CellType] = []
        self._params = list(model.parameters())
        self._follow([*model.modules(), *others])
        self._before = self._now()

    def _follow(self, roots: list[Any]) -> None:
        seen, waiting = set[int](), deque((root, 0) for root in roots)
        while waiting:
            one, depth = waiting.popleft()
            if id(one) in seen or depth > _DEPTH:
                continue
            seen.add(id(one))
            waiting += [(held, depth + 1) for held in self._note(one) if not isinstance(held, _PLAIN)]

    def _note(self, one: Any) -> Iterator[Any]:
        """Takes up where it could change; gives what it holds."""
        if isinstance(one, (Tensor, type, ModuleType)):
            return
        if isinstance(one, dict):
            self._sized.append(one)
            if len(one) <= _MOST:
                self._names += [(one, name) for name in one]
                yield from one.values()
        elif isinstance(one, (*_LISTS, set)):
            self._sized.append(one)
            if len(one) <= _MOST and not isinstance(one, set):
                self._lists.append(one)
                yield from one
        elif isinstance(one, functools.partial):
            yield from (one.func, *one.args, *one.keywords.values())
        elif isinstance(one, MethodType):
            yield from (one.__func__, one.__self__)
        elif isinstance(one, FunctionType):
            self._cells += one.__closure__ or ()
            read = [name for name in one.__code__.co_names if name in one.__globals__]
            self._names += [(one.__globals__, name) for name in read]
            yield from (cell.cell_contents for cell in one.__closure__ or () if is_filled(cell))
            yield from (value for name in read if not callable(value := one.__globals__[name]))
            yield vars(one)
        elif hasattr(one, "__dict__") and _is_theirs(one):
            yield vars(one)

    def _now(self) -> tuple[Any, ...]:
        values = [holder.get(name) for holder, name in self._names]
        values += [cell.cell_contents if is_filled(cell) else None for cell in self._cells]
        for held in self._lists:
            values += held
        return (
            values,
            list(map(len, self._sized)),
            [(p.requires_grad, p.data_ptr(), hooked(p)) for p in self._params],
        )

    def __call__(self) -> bool:
        """Whether they are."""
        (before, *others), (now, *rest) = self._before, self._now()
        return rest == others and all(map(_same, before, now))


def _same(one: Any, other: Any) -> bool:
    return is_(one, other) or (type(one) is type(other) and isinstance(one, _PLAIN) and one == other)


def is_filled(cell: CellType) -> bool:
    """Whether a closure's cell holds anything yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_theirs(one: Any) -> bool:
    """Whether an object's attributes are a caller's: loggers and locks, say, change by themselves."""
    return type(one).__module__ not in sys.stdlib_module_names or isinstance(one, SimpleNamespace)


def hooked(param: Tensor) -> bool:
    """Whether something hangs on the gradient of a parameter."""
    return bool(param._backward_hooks or param._post_accumulate_grad_hooks)


BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", *BACKWARD_HOOKS)
