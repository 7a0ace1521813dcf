"""Passes with a batch that leave the run as it is: what a step would have, and its samples and layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from surefoot.keys import seed_of
from surefoot.optim.gradients import global_norm
from surefoot.optim.statistics import Grown, Seen, worst
from surefoot.train_step import (
    Parts,
    gradients,
    losses_and_weights,
    pieces_of,
    repeatable,
    undo,
)
from surefoot.types import Minibatch


class Probe(NamedTuple):
    """What the guard would decide a step by. growths: of each batch norm's running statistics."""

    loss: float
    grad_norm: float
    growths: list[Grown]

    @property
    def growth(self) -> float:
        """Of the one that grows most; 1 without any."""
        return self.growths[worst(self.growths)].growth if self.growths else 1.0


def probe(parts: Parts, batch: Minibatch, *, each: list[Tensor] | None = None) -> Probe:
    """What a step with this batch would have; nothing is changed. The samples' losses go into `each`."""
    with _undone(parts):
        loss, _, grads, _ = gradients(parts, batch, each)
        return Probe(loss.item(), global_norm(grads).item(), parts.buffers.growths())


def gradient_norms(parts: Parts, batch: Minibatch) -> list[float]:
    """2-norm of the gradient of each of `parts.params` in a step with this batch, before clipping; NaN
    where it has none. Nothing is changed.
    """
    with _undone(parts):
        gradients(parts, batch)
    return [math.nan if p.grad is None else torch.linalg.vector_norm(p.grad).item() for p in parts.params]


def losses_of(parts: Parts, batch: Minibatch) -> Tensor:
    """The loss of each sample, float64[B], in a step with this batch; nothing is changed."""
    with _undone(parts):
        return repeatable(parts, batch, lambda: _only_forward(parts, batch))


def seen_of(parts: Parts, batch: Minibatch) -> list[Seen]:
    """What each batch norm sees of this batch alone; nothing is changed."""

    def passes() -> list[Seen]:
        parts.buffers.forget_statistics()
        _only_forward(parts, batch)
        return parts.buffers.seen()

    with _undone(parts):
        return repeatable(parts, batch, passes)


@contextmanager
def _undone(parts: Parts) -> Iterator[None]:
    """What passes do to buffers within it is undone."""
    whole = False
    parts.buffers.remember()
    try:
        yield
        whole = True
    finally:
        undo(parts, whole=whole)


def _only_forward(parts: Parts, batch: Minibatch) -> Tensor:
    """The loss of each sample, float64[B]."""
    found = []
    for piece in pieces_of(parts, batch):
        if piece.begins_micro:
            parts.generators.seed(seed_of(parts.draws, batch.slots.step, piece.micro))
        with parts.precision.forward(), parts.precision.attention():
            found.append(losses_and_weights(parts, piece.data, piece.num_rows)[0].detach().double())
    return torch.cat(found)
