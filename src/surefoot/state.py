"""The state of a run: everything that its next step depends on, and that a checkpoint holds.

Not in it, because they are functions of the step: the order of samples, the learning rate, random
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from surefoot.checkpoint.snapshot import Snapshot
from surefoot.checkpoint.tensors import flatten, unflatten
from surefoot.errors import StateError
from surefoot.guard.watch import Watch
from surefoot.measure.digest import digest
from surefoot.optim.buffers import Buffers
from surefoot.optim.patience import Patience
from surefoot.optim.precision import LossScale
from surefoot.optim.uncompiled import without_compiler
from surefoot.record.ledger import Ledger
from surefoot.segments import branches_of

_EXTRA, _TRANSIENT = "extra/", "transient/"
"""Prefixes, beside the model's own tensors, of tensors in extra state and of non-persistent buffers."""

_KERNELS = ("capturable", "foreach", "fused")
"""Options of parameter groups that are of the device a run goes on on, not of its state."""


@dataclass
class RunState:
    """Counters and parts with state.

    step: attempted updates. samples: consumed. num_refused: updates not applied. validated_at: step
    of the last validation. metrics: its values. lr_cuts: reductions on plateau so far. elapsed_s:
    seconds of training in all attempts. eager_from: the step from which on a compiled run is not, since its
    model was changed. diverged: the run ends here, beyond what can be healed.
    """

    model: nn.Module
    buffers: Buffers
    optimizer: Optimizer
    scale: LossScale | None
    guard: Watch
    plateau: Patience | None
    early_stopping: Patience | None
    ledger: Ledger = field(default_factory=Ledger)
    step: int = 0
    samples: int = 0
    num_refused: int = 0
    validated_at: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    lr_cuts: int = 0
    stopped_early: bool = False
    elapsed_s: float = 0.0
    eager_from: int | None = None
    diverged: bool = False

    COUNTERS: ClassVar[tuple[str, ...]] = (
        "step",
        "samples",
        "num_refused",
        "validated_at",
        "metrics",
        "lr_cuts",
        "stopped_early",
        "elapsed_s",
        "eager_from",
        "diverged",
    )

    def snapshot(self) -> Snapshot:
        """The whole state. Tensors are not copied: copy or write it before the next step. All else is:
        it is written while the run goes on.
        """
        model, metrics = dict[str, Tensor](), dict(self.metrics)
        aliases: dict[str, str] = {}
        extra: dict[str, Any] = {}
        beside: dict[str, Tensor] = {}
        seen: dict[tuple[Any, ...], str] = {}
        for name, value in self.model.state_dict().items():
            if not isinstance(value, Tensor):  # from a module's get_extra_state
                extra[name] = flatten(value, f"{_EXTRA}{name}", beside)
                continue
            place = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if value.numel() and place in seen:  # tied weights are kept once
                aliases[name] = seen[place]
                continue
            seen[place] = name
            model[name] = value
        for name, value in self.buffers.transient([*model, *aliases]).items():
            beside[f"{_TRANSIENT}{name}"] = value
        optimizer: dict[str, Tensor] = {}
        facts = {
            "counters": {name: getattr(self, name) for name in self.COUNTERS} | {"metrics": metrics},
            **self.ledger.to_json(),
            "aliases": aliases,
            "extra": extra,
            "optimizer": flatten(self._optimizer_state(), "", optimizer),
            "stateful": {
                name: part.state_dict() for name, part in self._stateful().items() if part is not None
            },
        }
        trained = {
            name for name, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad
        }
        changing = trained | set(self.buffers.changing)
        names = set(model)

        def more(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
            own = {name: tensors[name] for name in names}
            return {"digest": digest({**own, **{alias: own[name] for alias, name in aliases.items()}})}

        return Snapshot(
            {**{n: t for n, t in model.items() if n in changing}, **beside},
            optimizer,
            facts,
            frozen={n: t for n, t in model.items() if n not in changing},
            finite=frozenset(trained),
            metrics=metrics,
            more=more,
        )

    def num_bytes(self) -> int:
        """Of all tensors in it."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for slots in self.optimizer.state.values():
            tensors += [value for value in slots.values() if isinstance(value, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def restore(self, snapshot: Snapshot) -> None:
        """Puts a state back, by the names of parameters.

        Raises:
            StateError: the state is of another model or optimizer.
        """
        facts, kept = snapshot.facts, {**snapshot.frozen, **snapshot.model}
        extra = {name: unflatten(tree, kept) for name, tree in facts["extra"].items()}
        tensors = {n: t for n, t in kept.items() if not n.startswith((_EXTRA, _TRANSIENT))}
        tensors |= {alias: tensors[name] for alias, name in facts["aliases"].items()}
        try:
            self.model.load_state_dict(tensors | extra)
        except RuntimeError as error:
            raise StateError(
                f"the checkpoint is of another model: {error}",
                fix="Restore the model as it was when the run began, or train it with another --out.",
            ) from error
        transient = {n: t for n, t in kept.items() if n.startswith(_TRANSIENT)}
        self.buffers.put_back({n.removeprefix(_TRANSIENT): t for n, t in transient.items()})
        self._load_optimizer_state(unflatten(facts["optimizer"], snapshot.optimizer))
        for name, part in self._stateful().items():
            if part is not None:
                part.load_state_dict(facts["stateful"][name])
        for name, value in facts["counters"].items():
            setattr(self, name, value)
        self.ledger = Ledger(facts["ledger"], branches_of(facts))

    def _stateful(self) -> dict[str, LossScale | Watch | Patience | None]:
        return {
            "loss_scale": self.scale,
            "guard": self.guard,
            "plateau": self.plateau,
            "early_stopping": self.early_stopping,
        }

    def _names(self) -> list[str]:
        """Parameter names in the order in which the optimizer numbers them."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        params = [p for g in self.optimizer.param_groups for p in g["params"]]
        if any(id(p) not in names for p in params):
            raise StateError(
                "a parameter that is trained is no longer the model's.",
                why="Something put another in its place while the run went on: that one is not trained.",
                fix="Change parameters in place, under torch.no_grad(): weight.copy_(new).",
            )
        return [names[id(p)] for p in params]

    def _optimizer_state(self) -> dict[str, Any]:
        with without_compiler():
            state, names = self.optimizer.state_dict(), self._names()
        return {
            "state": {names[number]: slots for number, slots in state["state"].items()},
            "groups": [
                {k: float(v) if k == "lr" else v for k, v in group.items() if k != "params"}
                for group in state["param_groups"]
            ],
        }

    def _load_optimizer_state(self, kept: dict[str, Any]) -> None:
        with without_compiler():
            current, names = self.optimizer.state_dict(), self._names()
        if len(kept["groups"]) != len(current["param_groups"]) or not set(kept["state"]) <= set(names):
            raise StateError("the checkpoint is of another optimizer or other parameter groups.")
        numbers = {name: number for number, name in enumerate(names)}
        groups = []
        for now, then in zip(current["param_groups"], kept["groups"], strict=True):
            tuples = {k: tuple(v) for k, v in then.items() if isinstance(now.get(k), tuple)}
            kernels = {k: v for k, v in now.items() if k in _KERNELS}
            groups.append({**then, **tuples, **kernels, "params": now["params"]})
        numbered = {numbers[name]: slots for name, slots in kept["state"].items()}
        with without_compiler():
            self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        params = [p for g in self.optimizer.param_groups for p in g["params"]]
        for name, slots in kept["state"].items():  # torch casts all but `step` to the parameter's dtype
            state = self.optimizer.state[params[numbers[name]]]
            for slot, value in slots.items():
                if isinstance(value, Tensor) and state[slot].dtype != value.dtype:
                    state[slot] = value.to(state[slot].device)
