"""What a run was started with and on: what its bits depend on besides the recipe."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import surefoot


def environment(
    device: torch.device, *, compiled: str, micro_batch: int | None, layout: str
) -> dict[str, Any]:
    """What the bits of a result depend on besides the recipe, and what helps to repeat it. compiled: see
    `surefoot.choice.Extent`.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "surefoot": surefoot.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": f"{device.type} ({name})",
        "cpu": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": _kernel_variables(),
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        "micro_batch": micro_batch,
        "layout": layout,
    }


def _processor() -> str:
    """Its model: libraries choose their kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _kernel_variables() -> str:
    """Environment variables by which these libraries choose otherwise."""
    names = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    return " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


DECIDES_BITS = (
    "torch", "device", "cpu", "cpu_capability", "kernels", "threads", "compiled", "micro_batch",
    "layout",
)  # fmt: skip
"""Parts of the environment on which results agree to rounding only, if they differ."""


def differing(then: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """These parts, of two environments, with both values; what an older version did not record does not
    count.
    """
    return {k: [then[k], now[k]] for k in DECIDES_BITS if k in then and then[k] != now[k]}


def of_attempt(
    begun: Mapping[str, Any], events: Iterable[Mapping[str, Any]], attempt: float | None = None
) -> dict[str, Any]:
    """What an attempt (the last, if none is given) ran on, as far as it decides about bits: by the
    environment that the run began in, and its events.
    """
    found = dict(begun)
    for event in events:
        if event["kind"] == "resumed" and attempt in (None, event["attempt"]):
            found |= {name: values[1] for name, values in event.get("environment_changed", {}).items()}
    return found


def command_line() -> list[str]:
    """The command that began the run."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def code_commit() -> str | None:
    """The git commit of the working directory, with a ``+`` if files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
