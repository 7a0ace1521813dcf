"""Healing: what is done when a run goes wrong for longer than a step, or a sample breaks one.

After an alarm the run goes back to a healthy state, one that a hundred steps without an alarm followed, and
the steps from there are replayed, leaving no trace. If the replay gives other numbers than the log has, the
machine made a mistake, and the run goes on as it was. If it gives the same, remedies are tried, the mildest
first, each in a replay that must pass the place of the alarm; the first that does is kept.

All of it is a function of the recipe and the step, so an interrupted run heals alike.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Reversible, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple, Protocol

import torch

from surefoot.blame import Blame, outliers, to_blame, unlike_others
from surefoot.checkpoint.snapshot import Snapshot
from surefoot.checkpoint.store import DirectoryStore
from surefoot.data.feed import Feed
from surefoot.data.holes import leave_out
from surefoot.errors import StateError
from surefoot.guard.detect import FINE
from surefoot.guard.history import History, Intervention
from surefoot.guard.review import Alarm, may_have_done_harm
from surefoot.guard.stop import Stop
from surefoot.optim.finite import are_finite, have_nan, unsound
from surefoot.optim.schedules import Resolved
from surefoot.passes import losses_of, probe
from surefoot.state import RunState
from surefoot.train_step import Parts
from surefoot.types import Minibatch, Slots

EVERY = 200
"""Steps between states that a run can go back to, and between looks at layers and, after eager steps, at
the weights.
"""
SELDOM = 800
"""Steps between those that are kept in memory in compiled runs without a caller's body between steps:
the others are made again from them, to the same bits and in a moment.
"""
REMEMBERED = 2048
"""Rows that a replay is compared with."""
_HEALTHY = 100  # steps before the onset of an alarm that a state must lie back
_PASS_BY = 60  # steps beyond the alarm that a replay with a remedy must take
_COMPARED = 200  # steps that remedies are compared over if the run begins anew
_AGAIN = 300  # an alarm so soon after a rollback goes back further
_WINDOW = 10_000  # steps that the budget of rollbacks is for
_BEAR = 100  # steps that an alarm is put off for at first
_MANY_UNEXPLAINED, _OF_STEPS = 7, 20  # refused for running statistics; one less than is an alarm
_CANARY = 10  # batches that tell whether the weights are sound
_SIT_OUT = (100, 400)  # updates
_CUTS = 6  # powers of the factor by which the rate is cut
_LAST = 50  # losses that remedies are compared by
_IN_MEMORY, _MEMORY_SHARE = 3, 0.1  # states, and the share of free memory that they may take
_FEW = 8  # samples that may always be left out
_RATE_JUMP = 2.0


class Row(NamedTuple):
    """What is remembered of a step."""

    step: int
    loss: float
    grad_norm: float
    permitted: bool
    update_ratio: float
    verdict: float

    @property
    def overflowed(self) -> bool:
        """Whether loss and gradient were fine, and the update that the optimizer made of them was not."""
        return self.verdict == FINE and not self.permitted


class LetBe(NamedTuple):
    """Nothing is to be done: the run is to go on from where it was. reason: the alarm's, and what was seen.
    tried: names of remedies, of which none helped. untried: why none was.
    """

    reason: str
    tried: Sequence[str] = ()
    untried: str = ""


class StopAskedError(Exception):
    """A stop was asked for while healing."""


class Replay(Protocol):
    """Takes updates again, leaving no trace."""

    def __call__(
        self, until: int, rows: list[Row] | None = None, *, known: bool = False
    ) -> Alarm | Stop | None:
        """Up to a step, its rows added to `rows`; the first alarm, at which it stops, or None. known: these
        steps were taken before with the history as it is, so what they raise was answered then.

        Raises:
            StopAskedError: a stop was asked for.
        """
        ...


@dataclass
class Healer:
    """Goes back, and looks for what helps.

    initial: makes the state before the first update anew. doubts: what looked so wrong before the first
    step that a run which does not learn ends. own_from: the step at which this process began: rows from
    before may differ by rounding. memory: states by step.
    """

    parts: Parts
    state: RunState
    feed: Feed
    schedule: Resolved
    store: DirectoryStore
    total: int
    num_samples: int
    initial: Callable[[], Snapshot]
    doubts: Sequence[str] = ()
    own_from: int = 0
    rows: deque[Row] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    memory: dict[int, Snapshot] = field(default_factory=dict)
    _fits: bool | None = None
    _made_unsound: set[str] | None = None

    # ------------------------------------------------------------------ states to go back to

    def look(self) -> Alarm | None:
        """The alarm if the state is not finite."""
        return None if self._is_finite() else self.unsound()

    def last_look(self) -> Alarm | None:
        """The alarm for a state that no run is to end with."""
        return self.look() or _overflow(self.rows)

    def _is_finite(self) -> bool:
        """Whether weights are, what the optimizer keeps for them, and running statistics; weights that are
        not trained may be infinite. What a model is made with counts as finite.
        """
        updater, buffers, device = self.parts.updater, self.parts.buffers, self.parts.device
        if not (updater.weights_are_finite() and updater.state_is_finite()):
            return False
        frozen = {n: p for n, p in self.parts.model.named_parameters() if not p.requires_grad}
        statistics = dict(zip(buffers.statistics, buffers.live(buffers.statistics), strict=True))
        if are_finite(statistics.values(), device) and not have_nan(frozen.values(), device):
            return True
        if self._made_unsound is None:
            first = self.initial()
            made = {**first.frozen, **first.model}
            kept = [{name: made[name] for name in of if name in made} for of in (frozen, statistics)]
            self._made_unsound = unsound(*kept)
        return unsound(frozen, statistics) <= self._made_unsound

    def remember(self) -> None:
        """Keeps the state, which has been looked at, in memory, if it fits; after the first step."""
        if self._fit():
            self.memory[self.state.step] = self.state.snapshot().copy()
            while len(self.memory) > _IN_MEMORY:
                del self.memory[min(self.memory)]

    def _fit(self) -> bool:
        """Whether states fit into memory; asked when the optimizer has its state."""
        if self._fits is None:
            most = _MEMORY_SHARE * _free_bytes(self.parts.device)
            self._fits = self.state.num_bytes() * (_IN_MEMORY + 1) < most
        return self._fits

    def unsound(self) -> Alarm:
        """The alarm for a state that holds numbers that are not finite: the same whenever in a window of
        `EVERY` steps that is noticed.
        """
        begins = (self.state.step - 1) // EVERY * EVERY
        reason = "weights, or what the optimizer keeps for them, are not finite"
        return Alarm("D0", min(self.total, begins + EVERY) - 1, begins, reason)

    def _go_back(self, step: int, history: History, replay: Replay) -> None:
        """Puts the run into the state after `step` updates; `history` holds from there on."""
        guard, fit = self.parts.guard, self._fit()
        elapsed_s, now, told_slow = self.state.elapsed_s, guard.history, guard.reviewed.told_slow
        self.state.restore(self.nearest(step, now))
        guard.history = now
        replay(step, known=True)
        guard.reviewed.told_slow |= told_slow
        if self.state.step != step:
            raise StateError(f"step {step} could not be reached again: {self.state.step} was.")
        self.state.elapsed_s, guard.history = elapsed_s, history
        if fit and step not in self.memory:  # it is needed for each remedy
            self.memory[step] = self.state.snapshot().copy()

    def nearest(self, step: int, history: History) -> Snapshot:
        """The newest state at or before `step` on the way that the run has come."""
        at = max((s for s in self.memory if s <= step), default=-1)
        if at == step:
            return self.memory[at].copy()
        for checkpoint in sorted(self.store.checkpoints(), key=lambda c: -c.step):
            if at < checkpoint.step <= step:
                try:
                    found = self.store.load(checkpoint)
                except StateError:
                    continue
                if History.of(found.facts).leads_to(history, checkpoint.step):
                    return found
        return self.memory[at].copy() if at >= 0 else self.initial()

    # ------------------------------------------------------------------ after an alarm

    def heal(
        self, alarm: Alarm, replay: Replay, begins: Callable[[], object]
    ) -> dict[str, Any] | Stop | LetBe:
        """Goes back and finds what helps; the facts of it, or that nothing does: the run is then in a
        healthy state either way. After `LetBe` it may be in any. begins: called before steps are taken
        again, which may be thousands.
        """
        begun = time.perf_counter()
        before, rules = self.parts.guard.history, self.parts.guard.rules
        slow, resumed = alarm.detector == "D6", alarm.detector == "D7"
        if self._may_be_the_data(alarm) and self._weights_are_sound(alarm):
            return self._bear(alarm)
        applied = [row.update_ratio for row in self.rows if row.permitted and row.step <= alarm.step]
        if slow and not may_have_done_harm(applied) and not self.parts.guard.reviewed.has_risen():
            return LetBe(alarm.reason, untried="the updates were too small to have done harm")
        rollbacks = [i for i in before.interventions if i.kind == "rollback"]
        if sum(i.at > alarm.step - _WINDOW for i in rollbacks) >= rules.max_rollbacks:
            return Stop(
                f"{alarm.reason} (step {alarm.step}), after {len(rollbacks)} rollbacks",
                "Lower the learning rate, or see the events: each rollback says what was tried.",
            )
        target = _target(alarm, rollbacks)
        self.memory = {step: s for step, s in self.memory.items() if step <= target}
        compare = slow or target == 0  # there is no better state than where it comes to
        facts = {"step": target, "at": alarm.step, "detector": alarm.detector, "reason": alarm.reason}
        tried: list[str] = []

        def found(cause: str, remedy: str, *remedies: Intervention) -> dict[str, Any]:
            self._go_back(target, went_back.with_(*remedies), replay)
            seconds = round(time.perf_counter() - begun, 3)
            others = [name for name in tried if name != remedy]
            return facts | {"cause": cause, "remedy": remedy, "tried": others, "seconds": seconds}

        begins()
        now = self._again(target, alarm, replay)
        odd, told = self._first_difference(alarm, now), alarm.reason
        if odd is not None and not _repeat(now, self._again(target, alarm, replay)):
            odd = None  # so it says nothing of the machine
            facts["reason"] = told = f"{alarm.reason}; {_UNREPEATABLE}"
        forget = alarm.onset if odd is None else min(odd, alarm.onset)
        went_back = before.back_to(target, alarm.step, forget=forget)
        if resumed and odd is None:  # it was the earlier attempt that erred, if anything did
            return LetBe(told, untried="steps that are taken again come out as they did in this attempt")
        if odd is not None:
            return found(f"step {odd} does not reproduce: the machine made a mistake there", "none needed")
        best: tuple[float, str, list[Intervention]] | None = None
        untreated = [row.loss for row in self.rows if row.step <= alarm.step and row.permitted][-_LAST:]
        for name, remedies in self._remedies(alarm, target, compare, before, went_back, replay):
            if best is not None and remedies[0].kind == "sit_out":
                break
            self._go_back(target, went_back.with_(*remedies), replay)
            rows: list[Row] = []
            ends = [i.value for i in remedies if i.kind == "sit_out"]
            end = max([alarm.step, *ends]) + (1 if slow else _PASS_BY)
            end = max(end, _COMPARED) if compare else end
            again_bad = replay(min(self.total, int(end)), rows)
            again_bad = again_bad or self.look() or _overflow(rows)
            losses = [row.loss for row in rows[-_LAST:] if row.permitted]
            if again_bad is None and not losses:
                again_bad = Stop("no update is applied any more", "")
            if again_bad is None and not compare:
                return found(_CAUSES[remedies[0].kind], name, *remedies)
            reason = alarm.reason if again_bad is None else again_bad.reason
            tried.append(name if reason == alarm.reason else f"{name} ({reason})")
            if again_bad is None and (not slow or self._learns_better(losses, untreated)):
                loss = statistics.median(losses)
                best = min(best or (math.inf, "", []), (loss, name, remedies), key=lambda b: b[0])
        if best is not None:
            return found(_CAUSES[best[2][0].kind], best[1], *best[2])
        if slow and not self.doubts:
            return LetBe(told, tried, untried="" if tried else "there is no remedy for such a run")
        self._go_back(target, went_back, replay)
        return Stop(
            f"{told} (step {alarm.step}); going back to step {target} and on from there with "
            + ", or ".join(tried or ["what the guard may do"])
            + " did not help"
            + "".join(f". {doubt}" for doubt in self.doubts),
            "Lower the learning rate, normalise the data, or look at how the model is initialised.",
        )

    def _bear(self, alarm: Alarm) -> dict[str, Any]:
        """Puts the alarm off, longer each time; the facts of it."""
        guard = self.parts.guard
        until = alarm.step + 1 + _BEAR * 2 ** min(guard.history.count("bear"), 8)
        step = self.state.step
        guard.history = guard.history.with_(Intervention("bear", step, alarm.step, float(until)))
        if alarm.detector == "D4":  # else these batches would go on being refused
            guard.history = guard.history.with_(Intervention("anew", step, alarm.step))
        reason = (
            f"{alarm.reason}. On batches from before the weights do as well as ever: it is the batches "
            f"from step {alarm.onset} on that differ. Nothing is undone; watched until step {until}"
        )
        return {"step": alarm.step + 1, "detector": alarm.detector, "reason": reason}

    def _may_be_the_data(self, alarm: Alarm) -> bool:
        """Whether batches may have raised it: hardly, where the state is not finite, or updates are not."""
        if alarm.detector in ("D0", "D6", "D7"):
            return False
        return not any(row.overflowed for row in self.rows if alarm.onset <= row.step <= alarm.step)

    def _weights_are_sound(self, alarm: Alarm) -> bool:
        """Whether the losses on the batches before it began are what they were then: so it is not the
        weights that went wrong, but the data that came.
        """
        then = {row.step: row.loss for row in self.rows if alarm.onset - _CANARY <= row.step < alarm.onset}
        if len(then) < _CANARY:
            return False
        first = abs(self.parts.guard.reviewed.first)
        for step, loss in then.items():
            now, norm, _ = probe(self.parts, self.batch(step))
            if not (math.isfinite(norm) and now <= loss + max(0.5 * abs(loss), 0.1 * first)):
                return False
        return True

    def _learns_better(self, losses: list[float], untreated: list[float]) -> bool:
        """Whether the loss comes down, and these last losses are below the untreated ones by more than
        chance.
        """
        if not self.parts.guard.reviewed.learns() or not all(map(math.isfinite, [*losses, *untreated])):
            return False
        usual = statistics.median(untreated)  # a mean would be that of the few steps that broke the run
        spread = 1.4826 * statistics.median(abs(loss - usual) for loss in untreated)
        chance, gain = spread / math.sqrt(len(untreated)), usual - statistics.median(losses)
        return gain > max(4 * chance, 0.05 * abs(self.parts.guard.reviewed.first))

    def warms_up(self, step: int) -> bool:
        """Whether the rate is still far below what it will be."""
        at = [self.schedule(s) for s in range(0, self.total, max(1, self.total // 200))]
        return self.schedule(step) < 0.5 * max(at)

    def _again(self, target: int, alarm: Alarm, replay: Replay) -> list[Row]:
        """The steps from `target` up to the alarm, taken again with the history as it is."""
        rows: list[Row] = []
        self._go_back(target, self.parts.guard.history, replay)
        replay(min(self.total, alarm.step + 1), rows, known=True)
        return rows

    def _first_difference(self, alarm: Alarm, now: Sequence[Row]) -> int | None:
        """The first step whose replay gave other bits than it gave before."""
        resumed, own_from = alarm.detector == "D7", max(self.own_from, self.parts.kernels.free_from)
        before = {row.step: row for row in self.rows}
        for row in now:
            exact = (row.step if resumed else now[0].step) >= own_from
            if row.step in before and not same_row(before[row.step], row, exact=exact):
                return row.step
        return alarm.step if alarm.detector == "D0" and self._is_finite() else None

    def _remedies(
        self,
        alarm: Alarm,
        target: int,
        compare: bool,
        before: History,
        history: History,
        replay: Replay,
    ) -> Iterator[tuple[str, list[Intervention]]]:
        """What may help, the mildest first."""
        at, rules = alarm.step, self.parts.guard.rules
        broke = before.found_since(alarm.onset)
        if broke:
            yield (
                f"{len(broke)} samples left out that broke steps",
                [Intervention("quarantine", target, at, 0.0, broke)],
            )

        def rate(step: int) -> float:
            return history.multiplier(step, self.schedule(step, cuts=self.state.lr_cuts))

        calm = max(rate(step) for step in range(max(0, target - EVERY), target + 1))
        if target and max(rate(step) for step in range(target, at + 1)) > _RATE_JUMP * calm > 0:
            yield (
                f"the rate held at {calm:g} of the base rate",
                [Intervention("hold_rate", target, at, calm)],
            )
        slow = alarm.detector == "D6"
        if not slow:
            ids = self._suspects(alarm, target, history, replay)
        else:
            ids = self._suspects_at_first(history, replay) if target == 0 else ()
        if ids and self._may_quarantine(ids):
            yield f"{len(ids)} samples left out", [Intervention("quarantine", target, at, 0.0, ids)]
        self._go_back(target, history, replay)
        usual = self.parts.guard.usual_norm() or 1.0
        limit = min(usual, history.most_norm(target) or math.inf)
        clip = Intervention("clip", target, at, limit)
        if not slow or history.count("clip") == 0:
            yield f"the gradient's norm at most {limit:.3g}", [clip]
        if history.count("cut_rate") < rules.max_rate_cuts:
            for n in range(1, (_CUTS if compare else _CUTS // 2) + 1):
                cut = Intervention("cut_rate", target, at, rules.rate_cut**n)
                yield f"{cut.value:g} of the rate", [cut]
            yield f"{cut.value:g} of the rate and the gradient's norm at most {limit:.3g}", [cut, clip]
        if not slow:
            for length in _SIT_OUT:
                begins = max(target, alarm.onset - 1)
                sit_out = Intervention("sit_out", begins, at, float(begins + length))
                yield f"the {length} updates from step {begins} on sat out", [sit_out]

    def _suspects(self, alarm: Alarm, target: int, history: History, replay: Replay) -> tuple[int, ...]:
        """Samples whose losses stand out in the steps in which it began."""
        self._go_back(target, history, replay)
        found: set[int] = set()
        last = min(alarm.onset + 20, alarm.step, self.total - 1)
        for step in range(max(target, alarm.onset - 1), last + 1):
            replay(step)
            if self.state.step != step:
                break
            batch = self.batch(step)
            found |= set(outliers(batch, losses_of(self.parts, batch)))
        looked_at = (last + 1 - max(target, alarm.onset - 1)) * self.feed.plan.batch_size
        return tuple(sorted(found)) if len(found) <= max(_FEW, looked_at // 100) else ()

    def _suspects_at_first(self, history: History, replay: Replay) -> tuple[int, ...]:
        """Samples whose losses stand out in the first step, before which nothing is known to be usual."""
        self._go_back(0, history, replay)
        batch, each = self.batch(0), list[torch.Tensor]()
        probe(self.parts, batch, each=each)
        losses = losses_of(self.parts, batch)
        weightless = batch.slots.ids[(torch.cat(each).isnan() & losses.isfinite()).cpu().numpy()]
        found = tuple(i for i in outliers(batch, losses) if i not in weightless)
        return found if len(found) <= _FEW else ()

    def reconsidered(self, alarm: Alarm) -> Alarm | None:
        """A suspicion (D6) that the run does not learn; None if it turns out to be wrong. If samples that
        stand out had to be left out of what the loss was before the first update, the next batches are
        asked what theirs was, without what is left out by now: such samples may be in all of them. The
        state is as before.
        """
        reviewed = self.parts.guard.reviewed
        if reviewed.first != reviewed.untrained:
            return alarm
        now, history = self.state.snapshot().copy(), self.parts.guard.history
        self.state.restore(self.initial())
        batches = (self.batch(step, history, at=alarm.step) for step in range(1, 1 + _CANARY))
        losses = [probe(self.parts, batch)[0] for batch in batches]
        self.state.restore(now)
        reviewed = self.parts.guard.reviewed  # another by now
        reviewed.first = statistics.median([x for x in losses if math.isfinite(x)] or [reviewed.first])
        reviewed.untrained = math.nan
        return reviewed.collapse(alarm.step)

    # ------------------------------------------------------------------ after a refused step

    def blame(self, step: int, verdict: int) -> Blame:
        """Samples without which the step that was refused would have been permitted."""
        return to_blame(self.parts, self.batch(step), verdict)

    def batch(self, step: int, history: History | None = None, *, at: int | None = None) -> Minibatch:
        """The batch of a step, without what is in quarantine there; or in step `at` of another history."""
        batch = self.feed.at(step)
        out = (history or self.parts.guard.history).holes(step if at is None else at, batch.slots.ids)
        return batch if out is None else leave_out(batch, out)

    def let_grow(self, step: int, *, at_once: bool, lag: int) -> int | None:
        """Takes running statistics as they come for a while, longer each time: at once, or if many of the
        last steps were refused for them without samples to blame. Until which step, if so.
        """
        guard = self.parts.guard
        guard.unexplained = [s for s in guard.unexplained if s > step - _OF_STEPS] + [step]
        if len(guard.unexplained) < _MANY_UNEXPLAINED and not at_once:
            return None
        guard.unexplained = []
        begins = step + 1 + lag
        until: int = begins + _BEAR * 2 ** min(guard.history.count("grow"), 8)
        guard.history = guard.history.with_(Intervention("grow", begins, step, float(until)))
        return until

    def quarantine_at_once(self, batch: Minibatch) -> Blame:
        """Leaves out samples of a batch before which nothing is known, from its own step on; which."""
        guard, step = self.parts.guard, batch.slots.step
        blamed = unlike_others(self.parts, batch)
        if not blamed.ids or not self._may_quarantine(blamed.ids):
            return Blame(())
        guard.history = guard.history.with_(Intervention("quarantine", step, step, 0.0, blamed.ids))
        return blamed

    def quarantine(self, slots: Slots, blamed: Blame, *, lag: int) -> Stop | bool:
        """Leaves samples out from the next step on that does not have its batch yet; whether it does. If
        there are too many, the run ends, unless it may be the weights that are wrong.
        """
        guard = self.parts.guard
        if not self._may_quarantine(blamed.ids):
            if not blamed.broken_data:
                return False
            return Stop(
                f"more than {self._most_quarantined():,} of {self.num_samples:,} samples break a step, the "
                f"last in step {slots.step}.",
                "Look at the data: surefoot show lists the samples; or raise max_quarantined of the guard.",
            )
        one = Intervention("quarantine", slots.step + 1 + lag, slots.step, 0.0, blamed.ids)
        guard.history = guard.history.with_(one)
        return True

    def _may_quarantine(self, more: tuple[int, ...]) -> bool:
        now = self.parts.guard.history.quarantined(1 << 62)
        return len({*now, *more}) <= self._most_quarantined()

    def _most_quarantined(self) -> int:
        return max(_FEW, int(self.parts.guard.rules.max_quarantined * self.num_samples))


_UNREPEATABLE = "its steps, taken again, come out otherwise each time: model, data or kernels do not repeat"

_CAUSES = {
    "hold_rate": "the learning rate jumped",
    "quarantine": "samples whose losses stand out",
    "sit_out": "batches far from what is usual, for a while",
    "clip": "gradients too long",
    "cut_rate": "the learning rate is too high",
}


def _target(alarm: Alarm, rollbacks: Sequence[Intervention]) -> int:
    """How many updates the state has that the run is to go back to."""
    target = max(0, alarm.onset - _HEALTHY) // EVERY * EVERY
    again = [i for i in rollbacks if alarm.step - i.at < _AGAIN]
    if again:  # it did not last: one state further back
        target = max(0, min(target, again[-1].begins - EVERY))
    return target


def _overflow(rows: Reversible[Row]) -> Alarm | None:
    """The alarm if the last update was not finite, though loss and gradient were: nor will the next be."""
    last = list(takewhile(lambda row: row.overflowed, reversed(rows)))
    if not last:
        return None
    return Alarm("D5", last[0].step, last[-1].step, f"the last {len(last)} updates were not finite")


def same_row(a: Row, b: Row, *, exact: bool) -> bool:
    """To the bit; or, where another process took one of them, perhaps with other operations, roughly."""
    pairs = (a.loss, b.loss), (a.grad_norm, b.grad_norm), (a.permitted, b.permitted)
    return all(x == y or (x != x and y != y) or (not exact and abs(x - y) < 0.1 * abs(x)) for x, y in pairs)


def _repeat(one: Sequence[Row], other: Sequence[Row]) -> bool:
    """Whether the same steps, taken twice by this process, have the same bits."""
    alike = (same_row(a, b, exact=True) for a, b in zip(one, other, strict=False))
    return len(one) == len(other) and all(alike)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
