"""Compiled steps taken in a row, without Python between them, while Python does what is to be done beside.

What Python does around a small step takes a good part of the time that its kernels take. Where their calls
are compiled, too (`cpp_wrapper`), a loop of C++ (``laps.cpp``) calls them again and again, in a thread of
its own that never needs Python's lock: the next batches are fetched, and rows written, meanwhile. They are
the same kernels, and the bits are the same whoever calls them. The loop is put behind what torch's compiler
has written (torch 2.13); where that is not as expected, steps are called one by one.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from threading import get_ident
from typing import Any, NamedTuple
from weakref import WeakSet, finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]
NUM_NUMBERS = 4  # that a step gives
ALL_TAKEN, NOT_APPLIED, OUT_OF_TIME, FAILED = range(4)
"""How a lap ends: as asked; at a step that was not applied; at the time given; at an error."""
_ENTRY, _RELEASE = "void inductor_entry_impl(", "py::gil_scoped_release_simple release;"
_NEEDS_PYTHON = re.compile(r"\bPy[A-Z]|gil_scoped_acquire")


class _Lap(ctypes.Structure):
    _fields_ = (
        ("num_steps", ctypes.c_int64),
        ("until", ctypes.c_double),
        ("moving", ctypes.c_void_p),
        ("settings", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("num_taken", ctypes.c_int64),
        ("ending", ctypes.c_int64),
        ("begun", ctypes.c_double),
        ("last", ctypes.c_void_p),
        ("is_done", ctypes.c_int64),
        ("error", ctypes.c_char * 512),
    )


class Done(NamedTuple):
    """What came of a lap. rows: of each step that was applied its numbers, and when it ended, by
    `time.perf_counter`. begun: when the first did. last: the other tensor of the last that was applied.
    """

    rows: list[list[float]]
    begun: float
    last: Tensor | None
    ending: int
    error: Exception | None = None


@dataclass(slots=True)
class Begun:
    """A lap that was begun, with all that the loop reads and writes. handles: of the steps' own tensors."""

    memory: _Lap
    tensors: list[Tensor]
    handles: Words
    settings: NDArray[np.float64]
    rows: NDArray[np.float64]
    done: Done | None = None


class Laps:
    """Steps of compiled kernels, in laps.

    Args:
        kernels: what torch's compiler has made, within `with_laps`, of a function that gives float64[4],
            whose last number says whether the step was applied, and one more tensor.
        arguments: what they are called with; None where a step has tensors of its own.
        moves: where these are among the arguments, and among those of a step.
        written: two float64[n] among the arguments, which are written before each step.

    Raises:
        LookupError: the kernels are not of this kind.
    """

    def __init__(
        self,
        kernels: Callable[..., Any],
        arguments: Sequence[Tensor | None],
        moves: Sequence[tuple[int, int]],
        written: tuple[Tensor, Tensor],
    ) -> None:
        self._with_lock, self._without = _libraries_of(kernels)
        self._has_cores, self._order = len(os.sched_getaffinity(0)) > 1, [place for _, place in moves]
        fixed = [a for a in arguments if a is not None]
        moving, rest = {i: -1 - number for number, (i, _) in enumerate(moves)}, iter(range(len(fixed)))
        sources = np.array([moving[i] if i in moving else next(rest) for i in range(len(arguments))])
        handles = self._handles(fixed)
        self.steps = self._with_lock.surefoot_open(
            handles.ctypes.data, len(fixed), sources.ctypes.data, len(sources), len(moves),
            (ctypes.c_void_p * 2)(*(t.data_ptr() for t in written)),
            (ctypes.c_int64 * 2)(*(t.numel() for t in written)),
        )  # fmt: skip
        self._begun: list[Begun] = []  # another thread may write to them
        self._process = os.getpid()
        _all.add(self)
        finalize(self, _free, self.steps, self._with_lock, self._without, self._process).atexit = False

    @property
    def goes_on_meanwhile(self) -> bool:
        """Whether laps are taken by another thread, and one may be begun while another is under way. With
        more than one thread for kernels it would begin a second pool of them (OpenMP), and these slow each
        other down.
        """
        return self._has_cores and torch.get_num_threads() == 1

    def begin(
        self, moving: Sequence[Sequence[Any]], settings: NDArray[np.float64], until: float = float("inf")
    ) -> Begun:
        """Has steps taken after those that are under way, and none if one of these laps ends early. It ends
        early itself at a step that is not applied, and with one that ends at the time `until` or later.

        moving: of each step its tensors. settings: float64[steps, numbers], what is written before each.
        """
        own = [tensors[place] for tensors in moving for place in self._order]
        handles, rows = self._handles(own), np.empty((len(moving), NUM_NUMBERS + 1))
        places = handles.ctypes.data, settings.ctypes.data, rows.ctypes.data
        lap = Begun(_Lap(len(moving), until, *places), own, handles, settings, rows)
        is_first = all(before.done for before in self._begun)
        self._begun.append(lap)
        elsewhere = self.goes_on_meanwhile
        self._without.surefoot_begin(self.steps, ctypes.byref(lap.memory), is_first, elsewhere)
        return lap

    def wait(self, lap: Begun) -> Done:
        """What came of a lap, once it has ended."""
        if lap.done is None:
            memory = lap.memory
            self._without.surefoot_wait(self.steps, ctypes.byref(memory))
            handles, lap.handles = (
                lap.handles,
                lap.handles[:0],
            )  # once, whatever interrupts
            self._with_lock.surefoot_drop(handles.ctypes.data, len(handles))
            last = None
            if memory.last:
                capsules, memory.last = [_capsule(memory.last, None, None)], None
                (last,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)
            error = RuntimeError(memory.error.decode(errors="replace")) if memory.ending == FAILED else None
            rows = lap.rows[: memory.num_taken].tolist()
            lap.done = Done(rows, memory.begun, last, memory.ending, error)
            self._begun = [other for other in self._begun if other.done is None]
        return lap.done

    def end(self) -> None:
        """Ends the thread, once it has taken what was begun: laps are taken where they are begun then."""
        if os.getpid() == self._process:  # a fork has no such thread
            self._without.surefoot_end(self.steps)

    def _handles(self, tensors: list[Tensor]) -> Words:
        """Of tensors, to be dropped."""
        handles = np.empty(len(tensors), np.uint64)
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
        self._with_lock.surefoot_handles(capsules, handles.ctypes.data)
        return handles


_all: WeakSet[Laps] = WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread of the caller's may go on training: nothing is taken away from it."""
    for laps in list(_all):
        laps.end()


def _free(steps: int, with_lock: ctypes.PyDLL, without: ctypes.CDLL, process: int) -> None:
    if os.getpid() == process:
        without.surefoot_end(steps)
        with_lock.surefoot_free(steps)


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


@contextmanager
def with_laps() -> Iterator[None]:
    """Has torch's compiler, in this thread, put the loop behind a step that it makes, if that does not call
    Python itself. (An operation in it may: it asks for the lock.)
    """
    from torch._inductor.codecache import CppWrapperCodeCache  # here, since it takes two seconds

    load, here = CppWrapperCodeCache.load_pybinding, get_ident()

    def load_with_laps(argtypes: Sequence[str], main_code: str, *rest: Any, **options: Any) -> Any:
        is_a_step = get_ident() == here and options.get("num_outputs") == 2
        code = _with_loop(main_code) if is_a_step else main_code
        return load(argtypes, code, *rest, **options)

    CppWrapperCodeCache.load_pybinding = load_with_laps  # type: ignore[method-assign]
    try:
        yield
    finally:
        with suppress(AttributeError):  # it is inherited
            del CppWrapperCodeCache.load_pybinding


def _with_loop(code: str) -> str:
    """What the compiler has written for a step, and the loop; or just what it has written."""
    is_usual = code.count(_ENTRY) == code.count(_RELEASE) == 1
    if sys.platform != "linux" or not is_usual or _NEEDS_PYTHON.search(code):
        return code
    kernels = code.replace(_ENTRY, "static void surefoot_kernels(").replace(_RELEASE, "")
    return f"{kernels}\n{_loop()}"


@cache
def _loop() -> str:
    return files("surefoot").joinpath("laps.cpp").read_text()


def _libraries_of(kernels: Any) -> tuple[ctypes.PyDLL, ctypes.CDLL]:
    """The library that has the kernels, to be called with Python's lock, and without."""
    code, closure = getattr(kernels, "__code__", None), getattr(kernels, "__closure__", None)
    if code is None or not closure or "constants_tensor" in code.co_varnames:  # which would be inputs, too
        raise LookupError
    path = getattr(getattr(closure[0].cell_contents, "__self__", None), "__file__", None)
    if path is None:
        raise LookupError
    with_lock, without = ctypes.PyDLL(path), ctypes.CDLL(path)
    if not hasattr(with_lock, "surefoot_open"):
        raise LookupError
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    with_lock.surefoot_handles.argtypes = [ctypes.py_object, pointer]
    with_lock.surefoot_drop.argtypes = [pointer, number]
    with_lock.surefoot_open.argtypes = [pointer, number, pointer, number, number, pointer, pointer]
    with_lock.surefoot_open.restype = pointer
    with_lock.surefoot_free.argtypes = without.surefoot_end.argtypes = [pointer]
    without.surefoot_begin.argtypes = [pointer, pointer, number, number]
    without.surefoot_wait.argtypes = [pointer, pointer]
    return with_lock, without
