"""Where parameters sit in a model, to notice that something has put others in their place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from surefoot.errors import StateError


class Places:
    """Where the parameters that are trained sit.

    A module that assigns a new parameter to a name leaves the optimizer with the old one, which no loss
    depends on any more. So the old one takes over what is new, and its place: training goes on as if it had
    been changed where it is, and what the optimizer keeps for it stays.
    """

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter]) -> None:
        self._model = model
        self._of: dict[nn.Parameter, list[tuple[nn.Module, str, str]]] = {p: [] for p in params}
        for path, module in model.named_modules():
            for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
                if param in self._of:
                    self._of[param].append((module, name, f"{path}.{name}".lstrip(".")))

    def put_back(self, missed: Iterable[nn.Parameter]) -> bool:
        """Puts parameters back whose place another has; whether there were any. Their gradients are those
        of the others.

        Args:
            missed: those without a gradient, as one must be whose place another has.

        Raises:
            StateError: what is there now cannot be taken over.
        """
        found = False
        for param in missed:
            now = [getattr(module, name, None) for module, name, _ in self._of[param]]
            if any(new is param for new in now) or any(p is param for p in self._model.parameters()):
                continue
            for (module, name, path), new in zip(self._of[param], now, strict=True):
                _take_over(param, new if new is now[0] else None, path)
                setattr(module, name, param)
            found = True
        return found


def _take_over(param: nn.Parameter, new: object, path: str) -> None:
    if not isinstance(new, nn.Parameter) or _kind(new) != _kind(param):
        is_now = f"{_kind(new)} now" if isinstance(new, nn.Parameter) else "none any more, or untied"
        raise StateError(
            f"{path}, which is trained, was {_kind(param)}, and is {is_now}.",
            why="Something put that there while the run went on; what the optimizer keeps does not fit it.",
            fix="Keep shape, dtype and device, or change it in place, under torch.no_grad(): "
            "weight.copy_(new).",
        )
    with torch.no_grad():
        param.copy_(new)
    param.requires_grad_(new.requires_grad)
    param.grad = new.grad


def _kind(param: nn.Parameter) -> str:
    return f"{param.dtype} {tuple(param.shape)} on {param.device}"
