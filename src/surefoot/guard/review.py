"""The review: looks at rows on the host; raises an alarm where a run goes wrong for longer than a step."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from surefoot.guard.detect import BLOCK, BURN_IN, FINE, NOT_FINITE, SAT_OUT

_LEVEL_KEEPS = 0.9
_SPREAD_KEEPS = 0.98
_LEVEL_STEPS = 20
_MANY_SKIPS, _OF_STEPS = 8, 20
_SKIPS = (1 << _OF_STEPS) - 1
_HARD_STREAK = 4
_COLLAPSE_BLOCKS, _COME_DOWN = 6, 0.1
_COLLAPSE_STEPS = _COLLAPSE_BLOCKS * BLOCK
_SOME, _LARGE, _HUGE = 32, 0.002, 0.1  # updates, and norms relative to the weights
_RISEN = 0.25  # of the first loss

Detector = str
"""``D0`` state not finite (raised by `heal`), ``D3`` level divergence, ``D4`` skip rate, ``D5`` hard
streak, ``D6`` collapse, ``D7`` a continued run does not repeat what was (raised by `course`).
"""


class Alarm(NamedTuple):
    """Something that calls for going back. onset: the step in which it began, as far as can be told."""

    detector: Detector
    step: int
    onset: int
    reason: str


def may_have_done_harm(update_ratios: Sequence[float]) -> bool:
    """Whether updates were large enough to have broken a run whose loss has not come down: norms relative
    to that of the weights, of those that were applied; NaN where it was not measured, as with many weights
    in most steps. About 1e-3 is usual. Where they are smaller the run is slow, or tunes a model that does
    well already: going back, and on more gently, would not help.
    """
    measured = sorted((ratio for ratio in update_ratios if not math.isnan(ratio)), reverse=True)
    if len(update_ratios) < _SOME or not measured:
        return True
    some = max(1, _SOME * len(measured) // len(update_ratios))
    return measured[some - 1] > _LARGE or measured[0] > _HUGE


@dataclass
class Review:
    """Detectors over rows; call `look` with each, in order.

    age: rows seen. first: the first finite loss: before the first update, unless that was not finite.
    untrained: the loss before the first update of samples that do not stand out: what `first` is if the
    others would make a run that never came down look as if it had; until D6 asks other batches.
    skips: a bit for each of the last steps, the newest lowest. waiting: losses not looked at yet. losses:
    medians of the last blocks of them.
    told_slow: that the loss does not come down has been looked into.
    """

    age: int = 0
    first: float = math.nan
    untrained: float = math.nan
    level: float = math.nan
    spread: float = 0.0
    best: float = math.inf
    best_spread: float = 0.0
    num_above: int = 0
    num_not_finite: int = 0
    skips: int = 0
    waiting: list[float] = field(default_factory=list)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=_COLLAPSE_BLOCKS))
    told_slow: bool = False

    def look(self, *, step: int, loss: float, verdict: int, expected: bool, bears: bool) -> Alarm | None:
        """The alarm that this row raises, if any.

        Args:
            verdict: `FINE`, or why the update was refused.
            expected: it was refused because fp16 is looking for its loss scale, or for samples whose data
                are not finite, or ruin running statistics, and which are left out from now on.
            bears: neither a high level nor what is not finite is an alarm now.
        """
        self.age += 1
        if verdict == FINE and not self.skips and not expected:  # nearly every step
            waiting, self.num_not_finite = self.waiting, 0
            waiting.append(loss)
            return self._block(step, bears) if len(waiting) >= BLOCK else None
        if expected or verdict == SAT_OUT:
            return None
        counts = verdict != FINE and not (bears and verdict == NOT_FINITE)
        self.skips = (self.skips << 1 | counts) & _SKIPS
        self.num_not_finite = self.num_not_finite + 1 if verdict == NOT_FINITE else 0
        if self.num_not_finite >= _HARD_STREAK and not bears:
            onset = step - self.num_not_finite + 1
            return Alarm("D5", step, onset, f"{self.num_not_finite} steps in a row were not finite")
        num_skips = self.skips.bit_count()
        if num_skips >= _MANY_SKIPS and counts:
            onset = max(0, step + 1 - self.skips.bit_length())
            reason = f"{num_skips} of {_OF_STEPS} updates had to be refused"
            return Alarm("D4", step, onset, reason)
        if verdict != FINE:
            return None
        self.waiting.append(loss)
        return self._block(step, bears) if len(self.waiting) >= BLOCK else None

    def calm_for(self) -> int:
        """How many rows of permitted updates raise no alarm before the last, whatever their losses."""
        return self.calm_after(0)

    def calm_after(self, num: int) -> int:
        """The same after that many more such rows; none if one of these may raise an alarm."""
        left = BLOCK - len(self.waiting) - num
        if self.skips or (left <= 0 and not self._raises_none(num)):
            return 0
        return left if left > 0 else BLOCK + left

    def _raises_none(self, num: int) -> bool:
        """Whether the block that ends within as many more rows raises no alarm, whatever their losses."""
        left, ends = BLOCK - len(self.waiting), copy(self)
        if num >= left + BLOCK or math.isnan(self.level):  # another block ends, too; or this is the first
            return False
        ends.age += left
        ends._take_up(self.waiting, bears=False)
        if ends.num_above + left >= _LEVEL_STEPS:
            return False
        ends.losses = deque([*self.losses, math.inf], self.losses.maxlen)  # the worst that it can add
        return ends.collapse(0) is None

    def look_at_calm(self, step: int, losses: Sequence[float]) -> Alarm | None:
        """Looks at that many rows at most, all of them fine; the last is that of `step`."""
        self.age += len(losses)
        self.num_not_finite = 0
        self.waiting += losses
        return self._block(step, bears=False) if len(self.waiting) >= BLOCK else None

    def _block(self, step: int, bears: bool) -> Alarm | None:
        """Looks at the losses of some updates that were applied."""
        losses, self.waiting = self.waiting, []
        self._take_up(losses, bears)
        if self.num_above >= _LEVEL_STEPS:
            now = f"the loss, {self.level:.4g} over the last steps, was {self.best:.4g} at its best"
            return Alarm("D3", step, max(0, step - self.num_above), now)
        self.losses.append(statistics.median(losses))
        return None if bears else self.collapse(step)

    def _take_up(self, losses: Sequence[float], bears: bool) -> None:
        """D3: has the loss left its best level for good?"""
        if math.isnan(self.level):
            self.first = self.level = losses[0]
            if self._is_below_first(self.untrained):
                self.first = self.untrained
        level, spread, best, above = self.level, self.spread, self.best, self.num_above
        far, counts, is_old = self._far(), not bears, self.age > BURN_IN
        for loss in losses:
            residual = loss - level
            level += (1 - _LEVEL_KEEPS) * residual
            spread = _SPREAD_KEEPS * spread + (1 - _SPREAD_KEEPS) * residual * residual
            if not is_old:
                continue
            if level < best:
                best = self.best = level
                self.best_spread = math.sqrt(spread)
                far = self._far()
            above = above + 1 if level > far and counts else 0
        self.level, self.spread, self.num_above = level, spread, above

    def _far(self) -> float:
        """Above this the loss has left its best level."""
        return self.best + max(4 * self.best_spread, 0.5 * abs(self.best), 0.1 * abs(self.first))

    def collapse(self, step: int) -> Alarm | None:
        """D6: after many updates the loss is about what it was before the first. Such runs are calm: no
        spike tells. They may just be slow, so this is a suspicion, raised once.
        """
        if self.told_slow or len(self.losses) < _COLLAPSE_BLOCKS or self.learns():
            return None
        onset = max(0, step - self.age + 1) if self.age <= 2 * _COLLAPSE_STEPS else step - _COLLAPSE_STEPS
        return Alarm(
            "D6",
            step,
            onset,
            f"the loss is {statistics.median(self.losses):.4g} in the middle of {_COLLAPSE_STEPS} steps, "
            f"and was {self.first:.4g} before the first update",
        )

    def learns(self) -> bool:
        """Whether the loss has come down from where it began."""
        return self._is_below_first(statistics.median(self.losses))

    def has_risen(self) -> bool:
        """Whether the loss has gone up from where it began, clearly: small updates can do that to weights
        that are small themselves, or read large inputs.
        """
        return statistics.median(self.losses) > self.first + _RISEN * abs(self.first)

    def _is_below_first(self, loss: float) -> bool:
        """By what counts as having come down."""
        return loss <= self.first - _COME_DOWN * abs(self.first)

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            name: list(value) if isinstance(value, (deque, list)) else value
            for name, value in vars(self).items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        for name, value in state.items():
            mine = getattr(self, name)
            kept = list(value) if isinstance(mine, list) else value
            setattr(self, name, deque(value, mine.maxlen) if isinstance(mine, deque) else kept)
