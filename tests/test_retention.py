"""Retention is a pure function of what is there; whatever its rules, some things always stay."""

import math

from hypothesis import given
from hypothesis import strategies as st

from surefoot.checkpoint.retention import Kept, Retention, expendable

DAY = 86_400.0


@st.composite
def stores(draw):
    count = draw(st.integers(0, 12))
    metrics = st.fixed_dictionaries(
        {}, optional={"loss": st.floats(allow_nan=True), "acc": st.floats(0, 1)}
    )
    return [
        Kept(
            seq=i + 1,
            step=draw(st.integers(0, 1000)),
            time_s=draw(st.floats(0, 100 * DAY)),  # clocks jump
            metrics=draw(metrics),
            verified=draw(st.booleans()),
            certified=draw(st.booleans()),
            pinned=draw(st.integers(0, 9)) == 0,
            poisoned=draw(st.integers(0, 4)) == 0,
        )
        for i in range(count)
    ]


rules = st.builds(
    Retention,
    last=st.integers(1, 5),
    best=st.integers(0, 3),
    metric=st.sampled_from(["loss", "acc", "none"]),
    mode=st.sampled_from(["min", "max"]),
    span_s=st.none() | st.floats(1, 10 * DAY),
    age_s=st.none() | st.floats(1, 50 * DAY),
)
now = st.floats(0, 200 * DAY)


@given(stores(), rules, now)
def test_what_always_stays(kept, rules, now_s):
    gone = {k.seq for k in expendable(kept, rules, now_s=now_s)}
    stay = [k for k in kept if k.seq not in gone]
    sound = [k for k in kept if not k.poisoned]
    verified = [k for k in sound if k.verified]
    assert {k.seq for k in verified[-2:]} <= {k.seq for k in stay}
    assert len([k for k in stay if k.verified and not k.poisoned]) >= min(2, len(verified))
    certified = [k for k in sound if k.certified]
    assert not certified or certified[-1] in stay
    assert all(k in stay for k in kept if k.pinned)
    assert [k.seq for k in expendable(kept, rules, now_s=now_s)] == sorted(gone)


@given(stores(), rules, now)
def test_the_rest_goes_by_the_rules(kept, rules, now_s):
    gone = {k.seq for k in expendable(kept, rules, now_s=now_s)}
    young = [k for k in kept if not k.poisoned and (rules.age_s is None or now_s - k.time_s <= rules.age_s)]
    assert not gone & {k.seq for k in young[-rules.last :]}
    scored = [k for k in young if math.isfinite(k.metrics.get(rules.metric, math.nan))]
    sign = -1 if rules.mode == "max" else 1
    best = sorted(scored, key=lambda k: (sign * k.metrics[rules.metric], k.seq))[: rules.best]
    assert not gone & {k.seq for k in best}
    if rules.span_s is None and rules.best == 0:
        most = rules.last + 2 + 1 + 1 + sum(k.pinned for k in kept)
        assert len(kept) - len(gone) <= most


@given(stores(), rules, now)
def test_it_settles(kept, rules, now_s):
    """Applied to what it left, it takes nothing more."""
    gone = {k.seq for k in expendable(kept, rules, now_s=now_s)}
    assert expendable([k for k in kept if k.seq not in gone], rules, now_s=now_s) == []


def test_one_per_day_and_the_best():
    kept = [
        Kept(i, i, time_s=i * DAY / 4, metrics={"loss": abs(i - 9.5)}, verified=True) for i in range(1, 21)
    ]
    rules = Retention(last=2, best=1, span_s=DAY)
    gone = {k.seq for k in expendable(kept, rules, now_s=20 * DAY)}
    assert [k.seq for k in kept if k.seq not in gone] == [1, 4, 8, 9, 12, 16, 19, 20]
    old = Retention(last=2, best=1, span_s=DAY, age_s=2 * DAY)
    gone = {k.seq for k in expendable(kept, old, now_s=5 * DAY)}
    assert [k.seq for k in kept if k.seq not in gone] == [12, 16, 19, 20]
