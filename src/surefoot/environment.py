"""What a run was started with and on: what its bits depend on besides the recipe."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import surefoot


def environment(device: torch.device, *, compiled: bool) -> dict[str, Any]:
    """What the bits of a result depend on besides the recipe, and what helps to repeat it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "surefoot": surefoot.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": f"{device.type} ({name})",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "compiled": compiled,
    }


DECIDES_BITS = ("torch", "device", "cpu_capability", "threads", "compiled")
"""Parts of the environment on which results agree to rounding only, if they differ."""


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
