"""A function of tensors, compiled, and called without going through `torch.compile` each time.

A call through `torch.compile` first checks all that the trace depended on. With a small model that takes as
long as the rest of the step: 310 us against 185 (LABBOOK.md, 2026-11-25). So that check is made now and
then, and what is likely to change is looked at here, each time.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import get_ident
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakSet, finalize, ref

import torch
from torch import Tensor

from surefoot.laps import Laps, with_laps

_made: WeakSet[Compiled] = WeakSet()


class ChangedError(Exception):
    """Something that a trace depended on is not as it was."""


class Compiled:
    """A method that takes and returns tensors, compiled at its first call.

    Args:
        method: traced whole; what it reads besides its arguments counts as constant.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._options = {
            "fallback_random": True,  # torch's own random numbers: the masks that eager mode draws
            "size_asserts": False,
            "cpp_wrapper": True,  # the calls of kernels are compiled, too, and
            "cpp_wrapper_build_separate": True,  # apart: of deep models in a third of the time
        }
        self._kernels: Callable[[list[Any]], Sequence[Tensor]] | None = None
        self._taken: list[list[Any]] = []  # what the kernels were first called with
        self._fixed: list[Any] | None = None
        self._arguments: list[Any] = []
        self._moves: list[tuple[int, int]] = []
        self._laps: Laps | None = None
        self._laps_of: list[Any] | None = None
        self._num_traced = 0
        _made.add(self)
        function, owner = method.__func__, method.__self__  # type: ignore[attr-defined]
        this = ref(self)  # torch keeps all backends for ever

        def backend(graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
            compiled = this()
            assert compiled is not None
            return compiled._backend(graph, examples)

        own = MethodType(with_own_code(function), owner)
        self._through_torch = torch.compile(own, fullgraph=True, dynamic=False, backend=backend)

    def __call__(
        self,
        arguments: Sequence[Any],
        fixed: list[Any] | None = None,
        moving: Sequence[Any] = (),
        *,
        check: bool = True,
    ) -> Any:
        """The result.

        fixed, moving: the tensors among the arguments, in an order that is always the same: those that are
        the same objects in each call that has this list, and the others. With them the kernels are called
        right away, and the tensors of the result given back as a sequence.
        check: look whether what the trace depended on is as it was.

        Raises:
            ChangedError: it is not.
        """
        if check or fixed is None or self._fixed is None:
            try:
                with torch.no_grad(), _hooks_on_saved_tensors_stay():
                    result = self._through_torch(*arguments)
            except Exception as error:
                if self._num_traced > 1:
                    raise ChangedError from error
                raise
            if fixed is not None and self._fixed is None:
                self._learn(fixed, moving)
            return result
        if fixed is not self._fixed:
            now = dict(zip(map(id, self._fixed), fixed, strict=True))
            self._arguments = [now.get(id(a), a) for a in self._arguments]
            self._fixed = fixed
        return self.again(moving)

    def is_direct(self, fixed: list[Any]) -> bool:
        """Whether the last direct call had this list, so that `again` may be called."""
        return self._fixed is fixed

    def again(self, moving: Sequence[Any]) -> Sequence[Tensor]:
        """The last call's result for other `moving` tensors; nothing is checked."""
        assert self._kernels is not None
        taken = self._arguments.copy()  # the kernels empty it
        for i, place in self._moves:
            taken[i] = moving[place]
        return self._kernels(taken)

    def laps(self, written: tuple[Tensor, Tensor]) -> Laps | None:
        """What takes calls like the last one in a row; None if the calls of kernels are not compiled. See
        there for `written`.
        """
        if self._laps_of is not self._fixed:
            assert self._kernels is not None
            self._laps, self._laps_of = None, self._fixed
            with suppress(LookupError):
                self._laps = Laps(self._kernels, self._arguments, self._moves, written)
        return self._laps

    def _learn(self, fixed: list[Any], moving: Sequence[Any]) -> None:
        """Which of the arguments the kernels take where."""
        (taken,), self._taken[:] = self._taken, [[]]
        places = {id(a): i for i, a in enumerate(moving)}
        self._moves = [(i, places[id(t)]) for i, t in enumerate(taken) if id(t) in places]
        moved = {i for i, _ in self._moves}
        self._arguments = [None if i in moved else t for i, t in enumerate(taken)]
        self._fixed = fixed

    def _backend(self, graph: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        self._num_traced += 1
        if self._num_traced > 1:  # this is how torch tells
            raise ChangedError
        from torch._functorch import config  # here, since these take two seconds
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def compile_kernels(*of: Any, **options: Any) -> Any:
            with with_laps(), _no_word_of_shims():
                code: Any = compile_fx_inner(*of, **options)
            kernels, found = code.current_callable, self._taken

            def first(taken: list[Any]) -> Any:
                if not found:
                    found.append(list(taken))
                return kernels(taken)

            self._kernels, code.current_callable = kernels, first
            return code

        with config.patch(enable_autograd_cache=False):  # which would keep `compile_kernels` out
            made: Any = compile_fx(graph, examples, compile_kernels, config_patches=self._options)
        return made  # type: ignore[no-any-return]


def with_own_code(function: FunctionType) -> FunctionType:
    """The same function with a code object of its own: torch keeps there what it compiles, not more than
    eight times, and then goes on eagerly; a process may make more runs than that. And with names of its
    own, of which nothing is left when the function goes: torch puts graphs among them, and keeps them.
    """
    code, names = function.__code__.replace(), dict(function.__globals__)
    own = FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)
    finalize(own, _forget, names).atexit = False
    return own


def _forget(names: dict[str, Any]) -> None:
    names.update(dict.fromkeys(names))  # not cleared: torch may take them out one by one later on


@contextmanager
def _hooks_on_saved_tensors_stay() -> Iterator[None]:
    """Within `torch.func.grad` such hooks are disabled, and stay so if a trace of it fails (torch 2.13): no
    model with activation checkpointing could be trained in this process any more.
    """
    told = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    try:
        yield
    except BaseException:
        if told is None:
            torch._C._autograd._saved_tensors_hooks_enable()
        raise


@contextmanager
def _no_word_of_shims() -> Iterator[None]:
    """Torch warns of each operation that its C++ calls in another way than most."""
    here = get_ident()

    def is_of_use(record: logging.LogRecord) -> bool:
        return record.thread != here or "c-shim" not in str(record.msg)

    log = logging.getLogger("torch._inductor.ir")
    log.addFilter(is_of_use)
    try:
        yield
    finally:
        log.removeFilter(is_of_use)


def forget_failed_traces() -> None:
    """Has torch forget what it could not trace. It does not try that again, so that it would be left out of
    what is compiled next; and `torch.cond`, which traces itself, would fail for good (torch 2.13). Not once
    something has been compiled in this process, which torch would forget, too.
    """
    if "torch._dynamo" in sys.modules and not any(one._kernels for one in _made):
        torch._dynamo.reset()
