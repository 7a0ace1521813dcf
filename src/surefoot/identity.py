"""What a run is, as JSON, and how two descriptions differ."""

from __future__ import annotations

import ast
import enum
import functools
import hashlib
import inspect
import json
import math
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.measure.digest import digest
from surefoot.unchanged import is_filled

_LIBRARIES = {"torch", "numpy", "torchmetrics", "builtins", *sys.stdlib_module_names}


def _is_library(module: str) -> bool:
    """Whether code of this module counts by its name only."""
    file = str(getattr(sys.modules.get(module), "__file__", ""))
    return module.split(".")[0] in _LIBRARIES or ("site-packages" in file and module[:8] != "surefoot")


def describe(value: Any, within: tuple[int, ...] = ()) -> Any:
    """JSON that tells what a value does: numbers as they are, specs by their fields, functions by
    name and code. Two values with equal descriptions train alike, as far as can be told cheaply.

    Args:
        within: ids of the values that this one is a part of, since some contain themselves.
    """
    match value:
        case enum.Enum():
            return f"{type(value).__qualname__}.{value.name}"
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case np.generic():
            return describe(value.item())
        case Tensor() | np.ndarray():
            return _describe_array(value)
    if id(value) in within or len(within) > _DEEPEST:
        return type(value).__qualname__
    within = (*within, id(value))
    match value:
        case Mapping():
            return {str(name): describe(part, within) for name, part in value.items()}
        case tuple() | list():
            return [describe(part, within) for part in value]
        case set() | frozenset():
            return sorted((describe(part, within) for part in value), key=repr)
        case functools.partial():
            keywords = describe(value.keywords, within)
            return {"": describe(value.func, within), "args": describe(value.args, within), **keywords}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: describe(getattr(value, f.name), within) for f in fields(value)}
        return {"": type(value).__qualname__, **parts}
    if inspect.isroutine(value) or isinstance(value, type):
        return _describe_code(value, within)
    if isinstance(value, nn.Module):
        return describe_model(value)
    code = _describe_code(type(value), within)
    if _is_library(type(value).__module__):  # its inner state means nothing here
        return code if " at 0x" in repr(value) else repr(value)
    told = {
        name: describe(part, within)
        for name, part in _attributes(value).items()
        if not (name.startswith("_") and isinstance(part, list | set))  # what is collected, mostly
    }
    return {"": code, **told}


_DEEPEST = 8
_WHOLE_BYTES = 1 << 24


def _attributes(value: Any) -> dict[str, Any]:
    """Its attributes by name, those in slots too."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name) and name[:2] != "__"}
    return {**found, **getattr(value, "__dict__", {})}


def _describe_array(value: Tensor | np.ndarray[Any, Any]) -> str:
    """Shape, dtype and a digest: of all bytes up to 16 MiB, else of some rows."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        rows = value if value.dtype != torch.bfloat16 else value.float()
        array = rows.resolve_conj().numpy() if rows.layout == torch.strided else np.zeros(0)
    else:
        array = value
    some = array if array.nbytes <= _WHOLE_BYTES else array[:: max(1, len(array) // 1024)]
    return f"array {tuple(value.shape)} {value.dtype} {_short(np.ascontiguousarray(some).tobytes())}"


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Structure, parameters, plain attributes, first weights and code of a model just made."""
    kinds = {type(m) for m in model.modules()}
    attributes = [
        (prefix, name, describe(value))
        for prefix, module in model.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, _TELLING) and name not in _OF_ANY_MODULE
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


_TELLING = (bool, int, float, str, tuple, dict, enum.Enum)
_OF_ANY_MODULE = set(vars(nn.Module()))


def _describe_code(thing: Callable[..., Any] | type, within: tuple[int, ...] = ()) -> str:
    """The name, with a digest of the code for what is not of a library. Comments, layout and
    docstrings do not count; default arguments do, and the values that a function closes over, except
    lists and sets: these are mostly where it collects something.
    """
    name = str(getattr(thing, "__qualname__", type(thing).__qualname__))
    module = str(getattr(thing, "__module__", ""))
    if _is_library(module) or module.split(".")[0] == "surefoot":
        return f"{module}.{name}"
    held = [c.cell_contents for c in getattr(thing, "__closure__", None) or () if is_filled(c)]
    held += list(getattr(thing, "__defaults__", None) or ())
    held.append(getattr(thing, "__kwdefaults__", None))
    plain = [describe(h, (*within, id(thing))) for h in held if not isinstance(h, list | set)]
    return f"{name}#{_short(_code(thing) + repr(plain).encode())}"


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


def digest_of(identity: Mapping[str, Any]) -> str:
    """SHA-256 over what is learned: recipe, data, plan and the options of the command line."""
    parts = {name: identity[name] for name in ("recipe", "data", "plan")}
    options = identity["origin"].get("options", {})
    text = json.dumps({**parts, "options": options}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


ADDED: dict[str, Any] = {
    "recipe.guard.mode": "heal",
    "recipe.guard.max_rollbacks": 3,
    "recipe.guard.max_rate_cuts": 3,
    "recipe.guard.rate_cut": 0.5,
    "recipe.guard.max_quarantined": 0.05,
}
"""Settings that runs of earlier versions do not have, and what they may be for such a run to go on."""


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
    if before == now or (before is _ABSENT and path in ADDED and now == ADDED[path]):
        return []
    return [f"{path}: {before} -> {now}"]


_ABSENT = "(absent)"
