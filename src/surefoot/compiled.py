"""A function of tensors, compiled, and called without going through `torch.compile` each time.

A call through `torch.compile` first checks all that the trace depended on. With a small model that takes as
long as the rest of the step: 310 us against 185 (LABBOOK.md, 2026-11-25). So that check is made now and
then, and what is likely to change is looked at here, each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx


class ChangedError(Exception):
    """Something that a trace depended on is not as it was."""


class Compiled:
    """A method that takes and returns tensors, compiled at its first call.

    Args:
        method: traced whole; what it reads besides its arguments counts as constant.
        cpp_wrapper: the calls of kernels are compiled, too: 60 us less per step, 12 s more to compile.
    """

    def __init__(self, method: Callable[..., Any], *, cpp_wrapper: bool) -> None:
        self._options = {
            "fallback_random": True,  # torch's own random numbers: the masks that eager mode draws
            "size_asserts": False,
            "cpp_wrapper": cpp_wrapper,
        }
        self._inner: Callable[..., Sequence[Tensor]] | None = None
        self._taken: tuple[Any, ...] | None = None
        self._order: list[int] | None = None
        self._constants: list[Any] = []
        self._traced_again = False
        # A code object of its own: torch keeps there what it compiles, and not more than eight times; a
        # process may make more runs than that.
        function, owner = method.__func__, method.__self__  # type: ignore[attr-defined]
        own = MethodType(FunctionType(function.__code__.replace(), function.__globals__), owner)
        self._through_torch = torch.compile(own, fullgraph=True, dynamic=False, backend=self._backend)

    def __call__(
        self, arguments: Sequence[Any], flat: list[Any] | None = None, *, check: bool = True
    ) -> Any:
        """The result.

        flat: the tensors among the arguments, in an order that is always the same. With them what was
        compiled is called right away, and the first tensor of the result given back.
        check: look whether what the trace depended on is as it was.

        Raises:
            ChangedError: it is not.
        """
        if check or self._order is None or flat is None:
            try:
                with torch.no_grad():
                    result = self._through_torch(*arguments)
            except Exception as error:
                if self._traced_again:
                    raise ChangedError from error
                raise
            if flat is not None and self._order is None:
                self._learn(flat)
            self._taken = ()
            return result
        assert self._inner is not None
        flat = flat + self._constants
        return self._inner(*[flat[i] for i in self._order])[0]

    def _learn(self, flat: list[Any]) -> None:
        """Which of the arguments the compiled function takes where."""
        taken = self._taken or ()
        places = {id(a): i for i, a in enumerate(flat)}
        self._constants = [t for t in taken if id(t) not in places]
        places |= {id(t): len(flat) + i for i, t in enumerate(self._constants)}
        self._order = [places[id(t)] for t in taken]

    def _backend(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        if self._inner is not None:  # this is how torch tells
            self._traced_again = True
            raise ChangedError
        inner: Any = compile_fx(graph, examples, config_patches=self._options)

        def run(*arguments: Any) -> Any:
            if self._taken is None:
                self._taken = arguments
            return inner(*arguments)

        self._inner = inner
        return run


class Unchanged:
    """Whether a model, and other objects, are what they were: their attributes (plain ones by value, others
    by identity), the tensors of the model, and hooks on it.
    """

    def __init__(self, model: nn.Module, others: Iterable[object]) -> None:
        modules = list(model.modules())
        holders = [vars(m) for m in modules] + [vars(o) for o in others if hasattr(o, "__dict__")]
        plain = (bool, int, float, str, type(None))
        self._plain = [(h, name) for h in holders for name, value in h.items() if type(value) in plain]
        self._other = [(h, name) for h in holders for name, value in h.items() if type(value) not in plain]
        self._other += [(m._parameters, name) for m in modules for name in m._parameters]
        self._other += [(m._buffers, name) for m in modules for name in m._buffers]
        self._holders = [*holders, *(hooks for m in modules for hooks in _hooks(m))]
        self._params = list(model.parameters())
        self._before = self._now()

    def _now(self) -> tuple[Any, ...]:
        return (
            [holder.get(name) for holder, name in self._plain],
            [id(holder.get(name)) for holder, name in self._other],
            [len(holder) for holder in self._holders],
            [(p.requires_grad, p.data_ptr(), hooked(p)) for p in self._params],
        )

    def __call__(self) -> bool:
        """Whether they are."""
        return self._now() == self._before


def hooked(param: Tensor) -> bool:
    """Whether something hangs on the gradient of a parameter."""
    return bool(param._backward_hooks or param._post_accumulate_grad_hooks)


def _hooks(module: nn.Module) -> list[dict[Any, Any]]:
    return [getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks", *BACKWARD_HOOKS)]


BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
