"""Parameter groups by rule: who decays, who learns at what share of the rate, who is frozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from surefoot.errors import RecipeError, nearest
from surefoot.types import check_fields

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, slots=True)
class Group:
    """A rule for the parameters whose names match a glob.

    Args:
        match: glob over names as in ``model.named_parameters()``: ``"head.*"``, ``"*.bias"``.
        lr: multiplies the optimizer's rate.
        weight_decay: replaces the optimizer's; None keeps it, and the rule that biases and norms do
            not decay. ``Group("*", weight_decay=5e-4)`` decays everything.
        freeze: leaves these parameters as they are.
    """

    match: str
    lr: float = 1.0
    weight_decay: float | None = None
    freeze: bool = False

    def __post_init__(self) -> None:
        check_fields(self, f"group {self.match!r}")
        if self.lr < 0 or (self.weight_decay or 0.0) < 0:
            raise RecipeError(f"group {self.match!r}: lr and weight_decay must not be negative.")


def parameter_groups(
    model: nn.Module, rules: Sequence[Group], *, decays: bool = True
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: ``name``, ``params``, ``lr_scale``, maybe ``weight_decay``.

    Each trainable parameter is in exactly one group, in the model's order within it. By default
    biases, parameters of norms and everything of one dimension do not decay; if nothing does
    (`decays` is false), they need no group of their own. Freezes as told.

    Raises:
        RecipeError: a glob matches nothing, two match one parameter, or nothing is left to train.
    """
    norms = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, _NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    used: Counter[Group] = Counter()
    names = dict(model.named_parameters())
    for name, parameter in names.items():
        rule, *others = [r for r in rules if fnmatchcase(name, r.match)] or [Group("*")]
        if others:
            raise RecipeError(
                f"groups: {name!r} matches both {rule.match!r} and {others[0].match!r}.",
                why="A parameter belongs to one group.",
                fix="Narrow one of the globs.",
            )
        used[rule] += 1
        if rule.freeze:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        plain = name in norms or name.endswith("bias") or parameter.ndim <= 1
        exempt = decays and plain and rule.weight_decay is None
        label = rule.match if rule in rules else "weights"
        group = groups.setdefault(
            (label, exempt),
            {
                "name": {True: "biases and norms"}.get(exempt and label == "weights", label)
                + (" (no decay)" if exempt and label != "weights" else ""),
                "params": [],
                "lr_scale": rule.lr,
                **({"weight_decay": 0.0} if exempt else {}),
                **({} if rule.weight_decay is None else {"weight_decay": rule.weight_decay}),
            },
        )
        group["params"].append(parameter)
    for rule in rules:
        if not used[rule]:
            raise RecipeError(
                f"groups: {rule.match!r} matches no parameter.", fix=nearest(rule.match, names)
            )
    if not groups:
        raise RecipeError("the model has no parameter to train.", fix="Freeze fewer, or none.")
    return list(groups.values())


def table(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per built group, for people: name, tensors, parameters, lr at full rate, decay."""
    return [
        {
            "group": g["name"],
            "tensors": len(g["params"]),
            "parameters": sum(p.numel() for p in g["params"]),
            "lr": float(g["lr"]),
            "weight_decay": float(g.get("weight_decay", 0.0)),
        }
        for g in groups
    ]
