"""The model as a recipe makes it, and how its rows may be split."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import UninitializedParameter

from surefoot.checkpoint.tensors import can_keep
from surefoot.errors import OperationsError, RecipeError, SurefootError


def make_model(make: Callable[[], nn.Module], *, seed: int, device: torch.device) -> nn.Module:
    """The model as made after seeding, on the device; the process's generators stay as they were."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        torch.manual_seed(seed)
        model = make()
    except SurefootError:
        raise
    except Exception as error:
        raise RecipeError(f"model() raised {type(error).__name__}: {error}") from error
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model() made a {type(model).__name__}, not a torch.nn.Module.")
    lazy = [n for n, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise RecipeError(
            f"model has parameters without a shape yet: {', '.join(lazy[:3])}.",
            fix="Run one batch through it in the function that makes it, or give the sizes.",
        )
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and not can_keep(tensor):
            raise RecipeError(
                f"model: {name} is a {tensor.dtype} tensor of layout {tensor.layout}, which checkpoints "
                "cannot hold.",
                fix="Register it as a dense tensor of a common dtype.",
            )
    if not model.training:  # as pretrained models come; single modules keep their own mode
        model.train()
    return model.to(device)


def physical_rows(wanted: int | None, micro: int, model: nn.Module) -> int:
    """Rows through the model at once. Splitting further than the recipe does must not change what is
    learned, so it is refused where the rows of a micro-batch are not independent.
    """
    if wanted is None or wanted >= micro:
        return micro
    for name, module in model.named_modules():
        drops = isinstance(module, _DropoutNd) and module.p > 0
        if drops or (isinstance(module, _BatchNorm) and module.training):
            raise OperationsError(
                f"compute.micro_batch = {wanted} would split the recipe's micro-batch of {micro}.",
                why=f"{name} ({type(module).__name__}) treats the rows of a micro-batch together, so "
                "the split would change what is learned.",
                fix=f"Set batch.micro = {wanted} in the recipe, or leave compute.micro_batch out.",
            )
    return wanted
