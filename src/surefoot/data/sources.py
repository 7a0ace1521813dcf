"""Sources: arrays in memory, and any torch map-style dataset."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from surefoot.errors import DataError
from surefoot.keys import Words, key, words
from surefoot.types import Ids, Tree, leaves, map_leaves

_WHOLE_BYTES = 1 << 24
_SAMPLED_ROWS = 4096


class Arrays:
    """Arrays with one row per sample: tensors, numpy arrays (memory-mapped too), or what numpy takes.

    ``Arrays(x)`` fetches a tensor, ``Arrays(x, y)`` a tuple of tensors, ``Arrays(input=x, target=y)``
    a dict. A batch, or some batches that follow one another, is gathered in one call per array. Arrays are
    not copied; changing one during a run changes the run, from some steps later on, 32 at most.

    Args:
        arrays, named: the first dimension of each is the number of samples, N.

    Raises:
        DataError: none given, both kinds given, or their lengths differ.
    """

    def __init__(self, *arrays: Any, **named: Any) -> None:
        if bool(arrays) == bool(named):
            raise DataError(
                "Arrays needs arrays, either all by position or all by name.",
                fix="Arrays(x, y) or Arrays(input=x, target=y).",
            )
        tensors = [_tensor(a, i) for i, a in enumerate(arrays)]
        by_name = {name: _tensor(a, name) for name, a in named.items()}
        self._tree: Tree = by_name or (tensors[0] if len(tensors) == 1 else tuple(tensors))
        lengths = {len(t) for t in leaves(self._tree)}
        if len(lengths) != 1:
            raise DataError(
                f"Arrays got arrays of different lengths: {sorted(lengths)}.",
                why="The first dimension counts samples.",
            )
        self._leaves: list[Tensor] = leaves(self._tree)

    def __len__(self) -> int:
        return min([t.shape[0] for t in self._leaves])  # one of `arrays` may have been resized

    def fetch(self, ids: Ids) -> Tree:
        """Rows ``ids`` (int64[n]) of each array, in the nest the arrays were given in."""
        index = torch.from_numpy(ids) if ids.flags.writeable else torch.from_numpy(ids.copy())
        return map_leaves(lambda t: t.index_select(0, index), self._tree)

    def nest(self, parts: Sequence[Tensor]) -> Tree:
        """Leaves in the nest the arrays were given in."""
        if isinstance(self._tree, dict):
            return dict(zip(self._tree, parts, strict=True))
        return tuple(parts) if isinstance(self._tree, tuple) else parts[0]

    def arrays(self) -> list[Tensor]:
        """The arrays, as leaves of what `fetch` returns."""
        return self._leaves

    def row_bytes(self) -> list[int]:
        """Of one sample, per array."""
        return [t[:1].numel() * t.element_size() for t in self.arrays()]

    def fingerprint(self) -> dict[str, Any]:
        """Shapes, dtypes and a BLAKE2b digest: of all bytes up to 16 MiB, else of 4,096 rows."""
        tensors = self.arrays()
        num_bytes = sum(t.numel() * t.element_size() for t in tensors)
        whole = num_bytes <= _WHOLE_BYTES or len(self) <= _SAMPLED_ROWS
        if not whole:
            drawn = words(key("fingerprint", len(self)), np.arange(_SAMPLED_ROWS))
            rows = torch.from_numpy((drawn % np.uint64(len(self))).astype(np.int64))
        digest = hashlib.blake2b(digest_size=16)
        for tensor in tensors:
            some = tensor if whole else tensor.index_select(0, rows)
            if some.numel():
                digest.update(some.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return {
            "kind": "Arrays",
            "length": len(self),
            "arrays": [f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in tensors],
            "digest": digest.hexdigest(),
            "digest_of": "all rows" if whole else f"{_SAMPLED_ROWS} rows",
        }


def _tensor(array: Any, name: int | str) -> Tensor:
    if isinstance(array, Tensor):
        tensor = array.detach()
    else:
        try:
            array = np.asanyarray(array)
        except ValueError as error:  # ragged lists
            raise DataError(f"Arrays: array {name} is no array: {error}") from None
        if array.dtype.kind not in "biufc":
            raise DataError(f"Arrays: array {name} has dtype {array.dtype}, which is not numeric.")
        if not array.dtype.isnative:
            raise DataError(
                f"Arrays: array {name} has the byte order of another machine ({array.dtype}).",
                fix="array.astype(array.dtype.newbyteorder('='))",
            )
        if not array.flags.writeable and not isinstance(array, np.memmap):
            array = array.copy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is not writable: nothing here writes
            tensor = torch.as_tensor(array)
    if tensor.layout != torch.strided:
        raise DataError(
            f"Arrays: array {name} is sparse ({tensor.layout}).",
            fix="Give array.to_dense(), or a Dataset that makes its rows dense one by one.",
        )
    if tensor.ndim == 0:
        raise DataError(f"Arrays: array {name} has no dimension to count samples by.")
    if tensor.device.type != "cpu":
        raise DataError(
            f"Arrays: array {name} is on {tensor.device}.",
            fix="Give it on the CPU; surefoot moves batches to the device.",
        )
    return tensor


class Dataset:
    """Any map-style dataset: an object with ``len()`` and ``dataset[i]``, Hugging Face's too.

    Before each ``dataset[i]`` Python's `random`, numpy's global generator and torch's are seeded from
    (seed, epoch, i), so random augmentation is the same for any number of workers and after any
    restart. A generator that the dataset made for itself is beyond reach: draw from the global ones.

    Args:
        dataset: the dataset; with `data.workers` above 0 it is read in forked processes.
        collate: list of n samples -> tensors with n rows; torch's `default_collate` if left out.
        fingerprint: any string that changes when the data do, checked when a run continues.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        collate: Callable[[list[Any]], Tree] = default_collate,
        fingerprint: str | None = None,
    ) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DataError(
                f"Dataset got {type(dataset).__name__}, which has no len() or no [i].",
                fix="Give a map-style dataset; an iterable one has no order to continue.",
            )
        self._dataset, self._collate = dataset, collate
        self._fingerprint = fingerprint or getattr(dataset, "_fingerprint", None)

    def __len__(self) -> int:
        return len(self._dataset)

    def fetch(self, ids: Ids) -> Tree:
        """Samples ``ids`` (int64[n]), collated; random draws as of key 0."""
        return self.fetch_keyed(ids, np.zeros(len(ids), np.uint64))

    def fetch_keyed(self, ids: Ids, keys: Words) -> Tree:
        """Samples ``ids`` (int64[n]), collated; sample i sees generators seeded by ``keys[i]``."""
        with _generators_kept():
            samples = []
            for i, seed in zip(ids.tolist(), keys.tolist(), strict=True):
                random.seed(seed)
                np.random.seed(seed & 0xFFFFFFFF)
                torch.default_generator.manual_seed(seed)
                samples.append(self._dataset[i])
            return self._collate(samples)

    def fingerprint(self) -> dict[str, Any]:
        """Type, length and, where the dataset has one, its own fingerprint."""
        kind = type(self._dataset)
        return {
            "kind": f"Dataset of {kind.__module__}.{kind.__qualname__}",
            "length": len(self),
            "fingerprint": self._fingerprint,
        }


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Leaves the process's generators as they were found."""
    python, numpy_, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.set_rng_state(torch_)


def describe_source(source: Any) -> Mapping[str, Any]:
    """The identity of a source, as JSON: its own fingerprint, or its type and length."""
    if hasattr(source, "fingerprint"):
        return dict(source.fingerprint())
    kind = type(source)
    return {"kind": f"{kind.__module__}.{kind.__qualname__}", "length": len(source)}
