"""The roles that parts play for one another. Each is small, and tests hold a fake of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from surefoot.types import Ids, Tree

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from surefoot.keys import Words


class Source(Protocol):
    """Samples by number."""

    def __len__(self) -> int:
        """How many samples there are; the same during a whole run."""
        ...

    def fetch(self, ids: Ids) -> Tree:
        """Samples ``ids`` (int64[n]), in that order: tensors with n rows each, in any nest."""
        ...


@runtime_checkable
class KeyedSource(Protocol):
    """A source whose samples draw random numbers: augmentation."""

    def __len__(self) -> int: ...

    def fetch_keyed(self, ids: Ids, keys: Words) -> Tree:
        """Like `Source.fetch`; sample i may draw from ``keys[i]`` (uint64[n]) and nothing else."""
        ...


@runtime_checkable
class Fingerprinted(Protocol):
    """A source that can tell whether it is still the same data."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON that changes when the data do; cheap, at most a fraction of a second."""
        ...


class Objective(Protocol):
    """What is minimised."""

    def __call__(self, model: nn.Module, data: Tree) -> Tensor | tuple[Tensor, Tensor]:
        """Losses f32[n] of n samples, or (losses f32[n], weights f32[n]).

        The loss of a batch is the sum of losses x weights over the sum of weights.
        """
        ...


@runtime_checkable
class Weighing(Protocol):
    """An objective that knows the weights without running the model."""

    def weigh(self, data: Tree) -> Tensor | None:
        """Weights f32[n], the same that the call returns; None if it returns none."""
        ...


class GradientTransform(Protocol):
    """Changes the gradients of an update."""

    def __call__(self, grads: Sequence[Tensor], norm: Tensor) -> Tensor | None:
        """Changes `grads` in place, given their global 2-norm (0-d); returns the new norm, or None
        if it is not known without computing it again.
        """
        ...


OptimizerFactory = Callable[[list[dict[str, Any]]], "torch.optim.Optimizer"]
"""Any callable from parameter groups to a torch optimizer."""


class OptimizerSpec(Protocol):
    """A description of an optimizer."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over these parameter groups."""
        ...


class Strategy(Protocol):
    """Placement and agreement: how many processes train together, and on what they agree.

    The loop never asks how many there are; with one process every method is the identity.
    """

    def share(self, rows: int) -> slice:
        """Which rows of a batch of `rows` are this process's."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a value over all processes."""
        ...

    def reduce_gradients(self, grads: Iterable[Tensor]) -> None:
        """Sums gradients over all processes, in place."""
        ...

    def agree(self, flag: bool) -> bool:
        """Whether any process says so: stop, interrupted."""
        ...
