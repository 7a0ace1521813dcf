"""Tensors as safetensors files, written in one pass; and nests of them as JSON beside tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from surefoot.errors import StateError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def can_keep(tensor: Tensor) -> bool:
    """Whether the format has a place for it."""
    return tensor.layout == torch.strided and tensor.dtype in _DTYPES


def safetensors_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor.

    Written here rather than by the library so that they are hashed and synced on the way, without a
    second copy in memory. Format: https://github.com/huggingface/safetensors#format.

    Raises:
        StateError: a tensor is sparse or of a dtype that the format does not have.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        if not can_keep(tensor):
            raise StateError(
                f"{name}: a {tensor.dtype} tensor of layout {tensor.layout} cannot be kept.",
                fix="Register it as a dense tensor of a common dtype.",
            )
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        if plain.numel():
            yield plain.view(torch.uint8).numpy().data


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        StateError: it is no such file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise StateError(f"{path} cannot be read: {error}") from error


def flatten(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a nest of dicts, lists and numbers, with tensors moved to `tensors` under their path.

    Raises:
        StateError: it holds something else.
    """
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"$tensor": name}
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        return {key: flatten(value, f"{name}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [flatten(value, f"{name}/{i}", tensors) for i, value in enumerate(tree)]
    raise StateError(
        f"{name}: a {type(tree).__name__} cannot be kept.",
        why="State is kept as tensors and JSON; nothing is pickled.",
        fix="Keep numbers, strings, tensors, lists and dicts with string keys in it.",
    )


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`; tuples come back as lists."""
    match tree:
        case {"$tensor": str(name)}:
            return tensors[name]
        case dict():
            return {key: unflatten(value, tensors) for key, value in tree.items()}
        case list():
            return [unflatten(value, tensors) for value in tree]
    return tree
