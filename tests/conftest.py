"""Shared by all tests: small data, small models, and running the command line for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zygote import Command

import surefoot as sf
from surefoot.checkpoint.kept import list_checkpoints

hypothesis.settings.register_profile(  # machines are slow at times
    "no clock", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("no clock")

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)


def blobs(n: int = 256, features: int = 8, classes: int = 3, seed: int = 0):
    """Points around class centres: x float32[n, features], y int64[n]."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, features)) * 2
    y = rng.integers(0, classes, n)
    return (centres[y] + rng.normal(size=(n, features))).astype("float32"), y


def mlp(features: int = 8, classes: int = 3, hidden: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def recipe(**changes: Any) -> sf.Recipe:
    """A recipe that trains in a fraction of a second, with `changes`."""
    base: dict[str, Any] = {
        "model": mlp,
        "data": sf.Arrays(*blobs()),
        "objective": sf.supervised(F.cross_entropy),
        "optimizer": sf.SGD(lr=0.1, momentum=0.9),
        "batch": sf.Batch(32),
        "until": "2ep",
    }
    return sf.Recipe(**(base | changes))


def flat(model: nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., sf.Result]:
    """Trains ``recipe(**changes)`` in a new directory."""
    count = iter(range(1000))

    def run(*, operations: dict[str, Any] | None = None, **changes: Any) -> sf.Result:
        where = tmp_path / f"run{next(count)}"
        return sf.fit(recipe(**changes), out=where, operations=sf.Operations(**(operations or {})))

    return run


def copied(run: Path, to: Path, *, step: int = 0) -> Path:
    """A copy of a run that is between two steps, as a kill would leave it there: taken once no file of it
    is half written or half removed, and the state after `step` updates is written; and again if a file went
    while it was taken.
    """
    for _ in range(600):
        with suppress(shutil.Error, FileNotFoundError):
            newest = max((c.step for c in list_checkpoints(run / "checkpoints")), default=0)
            if not list(run.rglob(".*")) and newest >= step:
                return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns("LOCK", "BALLAST")))
        shutil.rmtree(to, ignore_errors=True)
        time.sleep(0.05)
    raise TimeoutError(f"{run} does not come to rest")


def surefoot_process(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own, with one thread. fresh: not forked from one that has its
    imports behind it.
    """
    fresh = options.pop("fresh", False)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **options.pop("env", {})}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    if fresh:
        return subprocess.Popen([sys.executable, "-m", "surefoot", *map(str, arguments)], **options)
    return Command(arguments, **options)


def surefoot(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command line to its end."""
    timeout = options.pop("timeout", 240)
    process = surefoot_process(*arguments, **options)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
