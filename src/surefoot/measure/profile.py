"""Where the time of some steps goes: torch's profiler, on demand, with the phases of a step by name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_WARM = 3
_OFF: AbstractContextManager[Any] = nullcontext()


def phase(name: str) -> AbstractContextManager[Any]:
    """Marks a part of a step by name, for NVIDIA's tools too, while a profiler runs; else does nothing."""
    return _Phase(name) if torch._C._autograd._profiler_enabled() else _OFF


class _Phase:
    """A range of torch's profiler and, where there is a GPU, of NVTX."""

    def __init__(self, name: str) -> None:
        self._range, self._name = record_function(name), name
        self._nvtx = torch.cuda.is_available()

    def __enter__(self) -> None:
        self._range.__enter__()  # type: ignore[no-untyped-call]
        if self._nvtx:
            torch.cuda.nvtx.range_push(self._name)  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._nvtx:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        self._range.__exit__(kind, error, trace)


class Profile:
    """The profile of some steps of an attempt, after a few that warm up.

    Args:
        folder: where the trace goes, and a table beside it.
        num_steps: how many.
    """

    def __init__(self, folder: Path, num_steps: int) -> None:
        self._folder, self._num_steps = folder, num_steps
        self._begins: int | None = None
        self._profiler: profile | None = None
        self._step: AbstractContextManager[Any] = _OFF
        self._done = False

    def before(self, step: int) -> dict[str, Any] | None:
        """To be called before each step, and after the last; once the profile is written, its facts."""
        if self._done:
            return None
        if self._begins is None:
            self._begins = step + _WARM
        self._step.__exit__(None, None, None)
        self._step = _OFF
        if step >= self._begins + self._num_steps:
            return self.end(step)
        if step >= self._begins:
            if self._profiler is None:
                self._profiler = _started()
            self._step = phase(f"step {step}")
            self._step.__enter__()
        return None

    def end(self, step: int) -> dict[str, Any]:
        """Ends, maybe early, before `step`. Its facts: ``file`` and the first step in it; or the ``reason``
        why there is none, which is none to end the run.
        """
        profiler, self._profiler, self._done = self._profiler, None, True
        self._step.__exit__(None, None, None)
        self._step = _OFF
        if profiler is None:
            return {"reason": f"the attempt ended within the {_WARM} steps that warm up"}
        profiler.stop()
        file = self._folder / f"steps-{self._begins}-{step - 1}.json"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(file))
            table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
            file.with_suffix(".txt").write_text(table + "\n")
        except (OSError, RuntimeError) as error:
            return {"reason": f"it could not be written: {error}"}
        return {"begins": self._begins, "file": f"{self._folder.name}/{file.name}"}


def _started() -> profile:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities, record_shapes=True)
    profiler.start()
    return profiler
