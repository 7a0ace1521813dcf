"""The device of a process, and what is process-wide about it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from surefoot.errors import OperationsError


def choose_device(name: str, *, threads: int | None, deterministic: bool) -> torch.device:
    """The device of that name (``auto``: a GPU if there is one), with this process set up for it.

    Raises:
        OperationsError: there is no such device here.
    """
    if threads is not None:
        set_threads(threads)
    if name == "auto":
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    else:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise OperationsError(
                f"device = {name!r} is unknown.", fix="Use cpu, cuda, cuda:1 or auto."
            ) from None
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type not in ("cpu", "cuda"):
        raise OperationsError(f"device = {name!r}: surefoot runs on cpu and cuda.")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise OperationsError(
                f"device = {name!r}: torch sees {torch.cuda.device_count()} GPUs.",
                fix="Use cpu or auto, or install a torch build for this GPU.",
            )
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.backends.cudnn.benchmark = False
    return device


def set_threads(num: int) -> None:
    """Gives torch's kernels that many threads, if they have not: that also empties a cache of kernels."""
    if torch.get_num_threads() != num:
        torch.set_num_threads(num)


class Kernels:
    """Which kernels forward and backward passes take on a GPU: those that repeat bit for bit, as long as
    each operation has one. The backward pass of attention has some, which torch takes only while it may
    refuse an operation that has none.

    strict: operations may be refused; so until one is. free_from: the first step since when they may not.
    """

    def __init__(self, device: torch.device, *, deterministic: bool) -> None:
        self.strict = deterministic and device.type == "cuda"
        self.free_from = 0

    @contextmanager
    def that_repeat(self) -> Iterator[None]:
        """Within it operations without such a kernel are refused, in the whole process."""
        before = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("error")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)

    def refused(self, error: RuntimeError, *, step: int) -> bool:
        """Whether an operation was. From this step on any kernel will do, and torch warns."""
        found = any(words in str(error) for words in _REFUSALS)
        if found:
            self.strict, self.free_from = False, step
        return found


_REFUSALS = "use_deterministic_algorithms", "No available kernel"  # the latter of attention


def _keep_freed_memory() -> None:
    """Lets glibc keep up to 1 GiB of freed memory instead of returning it to the system after each step,
    to be faulted in again page by page: a quarter of the time of a small convolutional network
    (docs/decisions/0009). Where the C library has no such settings, nothing happens.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_mmap_threshold, 32 << 20)
    mallopt(m_trim_threshold, 1 << 30)
    mallopt(m_top_pad, 64 << 20)
