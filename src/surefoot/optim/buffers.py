"""Buffers of a model, and undoing what a refused update's forward pass did to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from surefoot.optim.statistics import Grown, Seen, growth, growths_on_host, seen, settings_of, worst


class Buffers:
    """Buffers that the forward pass changes (batch-norm statistics), so that it can be undone.

    Those of norms always count, since torch's batch norm changes them without counting versions. Of the
    others, what the first forward pass changes does, by value, and what changes later is noticed by its
    version, or by being another tensor, until when its first copy is good. So constant tables cost memory
    once and no time.

    Args:
        rows: of a logical micro-batch, of which batch norms make statistics.
    """

    def __init__(self, model: nn.Module, *, rows: int) -> None:
        self._model = model
        self._owners: dict[str, tuple[dict[str, Tensor | None], str]] = {}
        self._unsaved: set[str] = set()
        for prefix, module in model.named_modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None and buffer.numel():
                    name = f"{prefix}.{leaf}" if prefix else leaf
                    self._owners[name] = (module._buffers, leaf)
                    if leaf in module._non_persistent_buffers_set:
                        self._unsaved.add(name)
        self._kept: dict[str, Tensor] = {}
        self._first: dict[str, tuple[int, int]] = {}
        self._initial: dict[str, Tensor] = {}  # of unsaved ones that change
        self._learned = False
        norms = {
            id(b) for m in model.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False)
        }
        self.changing = [name for name in self._owners if id(self._live(name)) in norms]
        names = {id(self._live(name)): name for name in self.changing}
        kept = {
            m: [names.get(id(b)) for b in (m.running_mean, m.running_var, m.num_batches_tracked)]
            for m in model.modules()
            if isinstance(m, _BatchNorm)
        }
        tracking = [
            m
            for m, those in kept.items()
            if None not in those and all(b.dim() <= 1 for b in m.buffers(recurse=False))
        ]
        self.statistics = [name for m in tracking for name in kept[m] if name is not None]
        self._norms, self._settings = tracking, [settings_of(m, rows) for m in tracking]
        self._held: Tensor | None = None

    def _live(self, name: str) -> Tensor:
        """The buffer as it is now: a model may put another tensor in its place."""
        buffers, leaf = self._owners[name]
        found = buffers[leaf]
        assert found is not None
        return found

    def remember(self) -> None:
        """Before the first forward pass of a step."""
        if not self._owners:
            return
        if not self._kept:
            live = {name: self._live(name) for name in self._owners}
            self._kept = {name: b.detach().clone() for name, b in live.items()}
            self._first = {name: (id(b), b._version) for name, b in live.items()}
        elif self.changing:
            now = [self._live(name) for name in self.changing]
            kept = [self._kept[name] for name in self.changing]
            if all(map(_alike, now, kept)):
                torch._foreach_copy_(kept, now)
            else:
                self._kept |= {n: b.detach().clone() for n, b in zip(self.changing, now, strict=True)}

    def growth(self, *, on_host: bool) -> Tensor | float | None:
        """Of running statistics in this step so far: see `growth`. A number on a host, else 0-d."""
        if not self.statistics:
            return None
        if on_host:
            found = self.growths()
            return found[worst(found)].growth if len(found) > 1 else found[0].growth
        kept, live = [self._kept[name] for name in self.statistics], self.live(self.statistics)
        return growth(kept, live, self.settings())

    def growths(self) -> list[Grown]:
        """Of each batch norm; waits for a device."""
        kept = [self._kept[name] for name in self.statistics]
        return growths_on_host(kept, self.live(self.statistics), self._settings)

    def forget_statistics(self) -> None:
        """Begins running statistics anew, until `settle`: those that the next forward pass changes."""
        for i, norm in enumerate(self._norms):
            if norm.training:
                for live in self.live(self.statistics[3 * i : 3 * i + 3]):
                    live.detach().zero_()

    def seen(self) -> list[Seen]:
        """What each batch norm has seen since `forget_statistics`."""
        live = self.live(self.statistics)
        return [seen(*pair) for pair in zip(live[1::3], live[2::3], self._settings, strict=True)]

    def have_seen(self) -> bool:
        """Whether any batch norm has seen a batch whose update was applied; waits for a device."""
        return any(num.item() for num in self.live(self.statistics[2::3]))

    def layer(self, place: int) -> str:
        """The name of one of those."""
        return self.statistics[3 * place].rpartition(".")[0]

    def settings(self) -> Tensor:
        """What `growth` has to know of each layer of `statistics`, on their device."""
        if self._held is None:
            device = self._live(self.statistics[0]).device if self.statistics else None
            self._held = torch.tensor(self._settings, dtype=torch.float32, device=device)
        return self._held

    def settle(self, permitted: Tensor, *, on_host: bool, whole: bool = True) -> None:
        """After the last one: keep the changes if `permitted` (bool, 0-d), else undo them. whole: it came
        to its end, so that what has not changed by now is what a pass does not change.
        """
        if not self._owners:
            return
        for name in self._owners:
            if name in self.changing:
                continue
            live = self._live(name)
            same = (id(live), live._version) == self._first[name]
            if not same or not (self._learned or torch.equal(live, self._kept[name])):
                if name in self._unsaved:
                    self._initial[name] = self._kept[name].clone()
                self.changing.append(name)
        self._learned |= whole
        if on_host and permitted.item():
            return
        for name in self.changing:
            live, kept = self._live(name), self._kept[name]
            if not _alike(live, kept):
                self._put(name, kept.clone())
            else:
                live.copy_(kept if on_host else torch.where(permitted, live, kept))

    def live(self, names: Iterable[str]) -> list[Tensor]:
        """Some of them as they are now."""
        return [self._live(name) for name in names]

    def _saved_memory(self) -> set[int]:
        """Where parameters and buffers lie that are restored without this class."""
        buffers = [self._live(name) for name in self._owners.keys() - self._unsaved]
        return {t.untyped_storage().data_ptr() for t in [*self._model.parameters(), *buffers]}

    def _put(self, name: str, value: Tensor) -> None:
        buffers, leaf = self._owners[name]
        buffers[leaf] = value

    def transient(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those that change and are not among `names`: registered as not persistent."""
        known = set(names)
        return {name: self._live(name) for name in self.changing if name not in known}

    def put_back(self, values: dict[str, Tensor]) -> None:
        """Restores what `transient` gave, and counts it among those that change; what began to change later
        becomes what it was before. To be called once the others are restored: that alone makes none of them
        one that changes.
        """
        saved = self._saved_memory()
        for name, value in values.items():
            live = self._live(name)
            if name not in self.changing:
                if name in self._unsaved and live.untyped_storage().data_ptr() not in saved:
                    self._initial[name] = live.detach().clone()
                self.changing.append(name)
            if _alike(live, value):
                live.copy_(value)
            else:
                self._put(name, value.to(live.device, copy=True))
        for name in self._initial.keys() - values.keys():
            live, initial = self._live(name), self._initial[name]
            apart = live.untyped_storage().data_ptr() not in saved  # else it was restored with the other
            if apart and _alike(live, initial):  # else the model may count on what it has become
                live.copy_(initial)
        for name in self._kept.keys() - set(self.changing):
            live = self._live(name)
            self._first[name] = (id(live), live._version)
            if not torch.equal(live, self._kept[name]):
                self._kept[name] = live.detach().clone()


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype
