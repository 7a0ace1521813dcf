"""The digest of a model's weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def digest(tensors: nn.Module | dict[str, Tensor]) -> str:
    """SHA-256 over a model's tensors (parameters and persistent buffers) in the order of their names.

    Of each: name, dtype and shape as text, then the bytes in row-major order. Equal digests mean
    equal bits.
    """
    if isinstance(tensors, nn.Module):
        tensors = {n: t for n, t in tensors.state_dict().items() if isinstance(t, Tensor)}
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        sha.update(f"{name}\n{dtype}\n{tuple(tensor.shape)}\n".encode())
        sha.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data))
    return sha.hexdigest()
