"""Plain values that all parts share. Importing this needs neither torch nor any part."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from numbers import Integral, Real
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from surefoot.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

Ids = NDArray[np.int64]
Tree = Any
"""Tensors in nested tuples, lists and dicts: what a source's `fetch` returns."""

HOLE = -1
"""The id of a slot that no sample fills; its weight is zero."""


# ---------------------------------------------------------------------------------- specs


def check_fields(spec: Any, name: str) -> None:
    """Checks the fields of a dataclass that are declared as plain values: numbers, texts, flags, choices,
    and tuples and unions of them. Fields of other types are left to who knows them.

    Raises:
        RecipeError: a value is of another type, or is not a number.
    """
    hints = get_type_hints(type(spec))
    for field in fields(spec):
        value, hint = getattr(spec, field.name), hints[field.name]
        if not _fits(value, hint):
            raise RecipeError(f"{name}: {field.name} = {value!r} must be {_in_words(hint)}.")


_PLAIN: dict[Any, tuple[type, str]] = {
    float: (Real, "a number"),
    int: (Integral, "a whole number"),
    bool: (bool, "True or False"),
    str: (str, "a text"),
    NoneType: (NoneType, "None"),
}


def _fits(value: Any, hint: Any) -> bool:
    if hint in _PLAIN:
        kind = _PLAIN[hint][0]
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) and value == value
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if get_origin(hint) is tuple and Ellipsis not in parts:
        same = isinstance(value, tuple | list) and len(value) == len(parts)
        return same and all(map(_fits, value, parts))
    if parts and all(part in _PLAIN or get_args(part) for part in parts):  # a union of plain types
        return any(_fits(value, part) for part in parts)
    return True


def _in_words(hint: Any) -> str:
    if hint in _PLAIN:
        return _PLAIN[hint][1]
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    parts = [_in_words(part) for part in get_args(hint)]
    return f"({', '.join(parts)})" if get_origin(hint) is tuple else " or ".join(parts)


# ---------------------------------------------------------------------------------- durations

Unit = Literal["updates", "ep", "%", "samples", "s"]
_UNITS: dict[str, tuple[Unit, int]] = {
    "": ("updates", 1),
    "ep": ("ep", 1),
    "%": ("%", 1),
    "samples": ("samples", 1),
    "s": ("s", 1),
    "min": ("s", 60),
    "h": ("s", 3600),
    "d": ("s", 86400),
}


@dataclass(frozen=True, slots=True)
class Duration:
    """How long: a number of updates, epochs, samples, percent of the run, or seconds."""

    value: Fraction
    unit: Unit

    def __str__(self) -> str:
        value = int(self.value) if self.value.denominator == 1 else float(self.value)
        return f"{value}{'' if self.unit == 'updates' else self.unit}"


DurationLike = int | str | Duration


def duration(text: DurationLike, *, name: str = "duration") -> Duration:
    """Reads ``700`` (updates), ``"20ep"``, ``"5%"``, ``"1e6samples"``, ``"30s"``, ``"5min"``, ``"2h"``.

    Raises:
        RecipeError: it is none of these, or not above zero.
    """
    if isinstance(text, Duration):
        return text
    match = re.fullmatch(r"\s*([0-9.eE+]+)\s*(ep|%|samples|s|min|h|d|)\s*", str(text))
    try:
        if match is None or isinstance(text, bool):
            raise InvalidOperation
        unit, factor = _UNITS[match[2]]
        value = Fraction(Decimal(match[1])) * factor
    except (InvalidOperation, ValueError, OverflowError):
        raise RecipeError(
            f"{name} = {text!r} is not a duration.",
            fix='Give updates (700), epochs ("20ep"), samples ("1e6samples"), a share of the run '
            '("5%"), or, for checkpoints, a time ("5min").',
        ) from None
    if value <= 0:
        raise RecipeError(f"{name} = {text!r} must be above zero.")
    if unit == "updates" and value.denominator != 1:
        raise RecipeError(f"{name} = {text!r}: updates come in whole numbers.")
    return Duration(value, unit)


# ---------------------------------------------------------------------------------- batches


class Slots(NamedTuple):
    """What the plan says of one update. B slots; a slot without a sample is a hole.

    ids: int64[B], `HOLE` where there is no sample. epoch: of the first slot, from 0.
    epochs: int64[B] if the batch straddles an epoch's end, else None. num_samples: B less holes.
    """

    step: int
    epoch: int
    ids: Ids
    epochs: Ids | None
    num_samples: int


class Minibatch(NamedTuple):
    """Samples of one update, on the device.

    data: what the source's fetch returned, B rows. weights: float[B], 0 in holes, or None if all are
    1. num_rows: B.
    """

    slots: Slots
    data: Tree
    weights: Tensor | None
    num_rows: int


class Outcome(NamedTuple):
    """What one update did. Numbers are 0-d tensors on the device: reading one may wait for it.

    step: the attempted update, from 0. epoch: in which it fell, from 0. samples: consumed by the run
    so far, this update included. lr: of the first parameter group. loss: weighted mean over the
    batch. grad_norm: global 2-norm before clipping. update_ratio: 2-norm of the change over 2-norm of
    the weights before it, not a number where it was not measured. permitted: whether the update was
    applied. metrics: of the validation that followed this update, else None.
    """

    step: int
    epoch: int
    samples: int
    lr: float
    loss: Tensor
    grad_norm: Tensor
    update_ratio: Tensor
    permitted: Tensor
    model: nn.Module
    batch: Minibatch
    metrics: dict[str, float] | None = None


# ---------------------------------------------------------------------------------- trees


_NESTS = (tuple, list, dict)


def map_leaves(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """The same nest of tuples, lists and dicts with `function` applied to each leaf."""
    if isinstance(tree, dict):
        return {name: map_leaves(function, branch) for name, branch in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(function, branch) for branch in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map_leaves(function, branch) for branch in tree)
    return function(tree)


def take_rows(tree: Tree, rows: slice | Ids, num_rows: int) -> Tree:
    """Rows of every array in a nest, and of every list of `num_rows` things that are no arrays, such as
    texts; what else there is stays as it is.
    """
    if hasattr(tree, "shape"):
        return tree[rows]
    if isinstance(tree, dict):
        return {name: take_rows(branch, rows, num_rows) for name, branch in tree.items()}
    if not isinstance(tree, tuple | list):
        return tree
    if len(tree) == num_rows and not any(hasattr(leaf, "shape") for leaf in leaves(tree)):
        return tree[rows] if isinstance(rows, slice) else type(tree)(tree[i] for i in rows.tolist())
    branches = [take_rows(branch, rows, num_rows) for branch in tree]
    return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)


def leaves(tree: Tree) -> list[Any]:
    """The leaves of a nest of tuples, lists and dicts, in order."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if not isinstance(tree, _NESTS):
        return [tree]
    found = []
    for branch in tree:
        if isinstance(branch, _NESTS):
            found += leaves(branch)
        else:
            found.append(branch)
    return found
