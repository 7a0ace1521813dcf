"""What a run is, as JSON, and how two descriptions differ."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import surefoot
from surefoot.measure.digest import digest

_FOREIGN = ("torch", "numpy", "torchmetrics", "builtins")


def describe(value: Any) -> Any:
    """JSON that tells what a value does: numbers as they are, specs by their fields, functions by
    name and code. Two values with equal descriptions train alike, as far as can be told cheaply.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case np.generic():
            return describe(value.item())
        case Tensor() | np.ndarray():
            data = np.ascontiguousarray(value.detach().cpu() if isinstance(value, Tensor) else value)
            return f"array {data.shape} {data.dtype} {_short(data.tobytes())}"
        case Mapping():
            return {str(name): describe(part) for name, part in value.items()}
        case tuple() | list():
            return [describe(part) for part in value]
        case functools.partial():
            keywords = describe(value.keywords)
            return {"": describe(value.func), "args": describe(value.args), **keywords}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: describe(getattr(value, f.name)) for f in fields(value)}
        return {"": type(value).__qualname__, **parts}
    if inspect.isroutine(value) or isinstance(value, type):
        return _describe_code(value)
    if isinstance(value, nn.Module):
        return describe_model(value)
    if not hasattr(value, "__dict__") and " at 0x" not in repr(value):
        return repr(value)
    attributes = {
        name: describe(part)
        if isinstance(part, _PLAIN) or inspect.isroutine(part)
        else type(part).__qualname__
        for name, part in getattr(value, "__dict__", {}).items()
        if not name.startswith("_")
    }
    return {"": _describe_code(type(value)), **attributes}


_PLAIN = (bool, int, float, str, tuple, list, dict, Tensor, np.ndarray, type(None))


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Structure, parameters, plain attributes, first weights and code of a model just made."""
    kinds = {type(m) for m in model.modules()}
    attributes = [
        (prefix, name, describe(value))
        for prefix, module in model.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | tuple) and name[0] != "_" and name != "training"
    ]
    shapes = [(n, str(p.dtype), tuple(p.shape)) for n, p in model.named_parameters()]
    return {
        "class": type(model).__qualname__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "structure": _short(f"{model}{shapes}".encode()),
        "attributes": _short(repr(attributes).encode()),
        "initial": digest(model)[:12],
        "code": sorted(c for k in kinds if "#" in (c := _describe_code(k))),
    }


def _describe_code(thing: Callable[..., Any] | type) -> str:
    """The name, with a digest of the code for what is not of a library. Comments, layout and
    docstrings do not count; the values a function closes over do.
    """
    name = str(getattr(thing, "__qualname__", type(thing).__qualname__))
    module = str(getattr(thing, "__module__", ""))
    if module.split(".")[0] in (*_FOREIGN, "surefoot"):
        return f"{module}.{name}"
    closure = getattr(thing, "__closure__", None) or ()
    held = [c.cell_contents for c in closure if _is_plain(c)]
    held += list(getattr(thing, "__defaults__", None) or ())
    plain = [describe(h) for h in held if isinstance(h, bool | int | float | str | tuple)]
    return f"{name}#{_short(_code(thing) + repr(plain).encode())}"


def _is_plain(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, bool | int | float | str | tuple)
    except ValueError:  # an empty cell
        return False


def _code(thing: Any) -> bytes:
    code = getattr(thing, "__code__", None)
    if code is not None and thing.__name__ == "<lambda>":  # its source line holds more than itself
        constants = [sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in code.co_consts]
        return repr((code.co_code, code.co_names, [c for c in constants if _repeats(c)])).encode()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):
        return code.co_code if code is not None else b""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]
    return ast.unparse(tree).encode()


def _repeats(constant: Any) -> bool:
    """Whether its repr is the same in every process; that of code holds an address."""
    return not hasattr(constant, "co_code")


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


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


def digest_of(identity: Mapping[str, Any]) -> str:
    """SHA-256 over what is learned: recipe, data, plan and the options of the command line."""
    parts = {name: identity[name] for name in ("recipe", "data", "plan")}
    options = identity["origin"].get("options", {})
    text = json.dumps({**parts, "options": options}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Lines ``path: before -> now`` for all places in which two descriptions differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for name in dict.fromkeys([*before, *now]):
            below = f"{path}.{name}" if path and name else path or name
            lines += differences(before.get(name, _ABSENT), now.get(name, _ABSENT), below)
        return lines
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line
            for i, (b, n) in enumerate(zip(before, now, strict=True))
            for line in differences(b, n, f"{path}[{i}]")
        ]
    return [] if before == now else [f"{path}: {before} -> {now}"]


_ABSENT = "(absent)"
