"""Retention: which checkpoints may go. A pure function of what is there; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

LEAST_VERIFIED = 2


@dataclass(frozen=True)
class Kept:
    """What retention looks at.

    seq: order of writing. time_s: when, in seconds since the epoch of Unix. metrics: of the newest
    validation then. verified: this process wrote it or has read every byte. certified: enough healthy
    updates followed. pinned: to stay until the pin is taken away. poisoned: holds numbers that are not
    finite; never restored.
    """

    seq: int
    step: int
    time_s: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    verified: bool = False
    certified: bool = False
    pinned: bool = False
    poisoned: bool = False


@dataclass(frozen=True)
class Retention:
    """What is to stay: the union of what the rules say.

    Args:
        last: the newest `last`.
        best: the best `best` by `metric` (smallest for mode ``"min"``).
        span_s: besides, the first of each span of so many seconds.
        age_s: nothing older stays, except what is pinned or what always stays.
    """

    last: int = 3
    best: int = 0
    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    span_s: float | None = None
    age_s: float | None = None


def expendable(kept: Sequence[Kept], rules: Retention, *, now_s: float) -> list[Kept]:
    """Those that may go, oldest first.

    Whatever the rules say, there stay: what is pinned, the two newest verified, the newest certified, and
    the newest poisoned one, for forensics. Order is that of writing (`seq`), so a clock that jumps changes
    nothing but age and spans.
    """
    ordered = sorted(kept, key=lambda k: k.seq)
    sound = [k for k in ordered if not k.poisoned]
    young = [k for k in sound if rules.age_s is None or now_s - k.time_s <= rules.age_s]
    stay = {k.seq for k in young[-rules.last :]}
    stay |= {k.seq for k in _best(young, rules)}
    if rules.span_s is not None:
        firsts: dict[int, int] = {}
        for k in young:
            firsts.setdefault(math.floor(k.time_s / rules.span_s), k.seq)
        stay |= set(firsts.values())
    stay |= {k.seq for k in [k for k in sound if k.verified][-LEAST_VERIFIED:]}
    stay |= {k.seq for k in [k for k in sound if k.certified][-1:]}
    stay |= {k.seq for k in [k for k in ordered if k.poisoned][-1:]}
    stay |= {k.seq for k in ordered if k.pinned}
    return [k for k in ordered if k.seq not in stay]


def _best(kept: Sequence[Kept], rules: Retention) -> list[Kept]:
    sign = -1 if rules.mode == "max" else 1
    measured = [k for k in kept if math.isfinite(k.metrics.get(rules.metric, math.nan))]
    return sorted(measured, key=lambda k: (sign * k.metrics[rules.metric], k.seq))[: rules.best]
