"""What the guard's limits are, by what its documentation says of them."""

import json
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surefoot.guard.arithmetic import Numbers, Tensors
from surefoot.guard.detect import (
    BURN_IN,
    FINE,
    GRADIENT_SPIKE,
    LOSS_SPIKE,
    NOT_FINITE,
    Limits,
    Statistics,
    judge,
    limits,
    take_up,
)
from surefoot.guard.judge import Judge

BELOW, ABOVE = 0.999, 1.001
HOST, DEVICE = Numbers(), Tensors(torch.device("cpu"))
STATISTICS = st.builds(
    Statistics,
    log_mean=st.floats(-20, 20),
    log_var=st.floats(0, 4),
    mean=st.floats(-10, 100),
    var=st.floats(0, 1e4),
    first=st.floats(0.01, 100),
    height=st.just(0.0),
)


def decided(xp, seen, *, above=0.0, rise=0.0, was_high=False, early=False):
    """On a gradient whose log norm, and a loss that, are so much above the mean."""
    seen = Statistics(*map(xp.number, seen))
    norm, loss = xp.number(math.exp(float(seen.log_mean) + above)), xp.number(float(seen.mean) + rise)
    if xp is DEVICE:
        was_high = torch.tensor(was_high)
    found = judge(xp, limits(xp, seen, early=early), loss, norm, was_high=was_high, early=early)
    return float(found.verdict), float(found.clip), bool(found.high)


def deviations(seen):
    of_loss = max(math.sqrt(seen.var), 0.01 * abs(seen.mean) + 0.001 * seen.first)
    return max(math.sqrt(seen.log_var), 0.05), of_loss


@pytest.mark.parametrize("xp", [HOST, DEVICE], ids=["host", "device"])
@given(seen=STATISTICS)
def test_a_gradient_spike_is_6_deviations_and_10_times_above_what_is_usual(xp, seen):
    spike = max(6 * deviations(seen)[0], math.log(10))
    assert decided(xp, seen, above=BELOW * spike)[0] == FINE
    assert decided(xp, seen, above=ABOVE * spike)[0] == GRADIENT_SPIKE


@pytest.mark.parametrize("xp", [HOST, DEVICE], ids=["host", "device"])
@given(seen=STATISTICS)
def test_a_long_gradient_is_3_deviations_and_twice_above_and_is_shortened_to_2_deviations(xp, seen):
    deviation = deviations(seen)[0]
    long = max(3 * deviation, math.log(2))
    assert decided(xp, seen, above=BELOW * long) == (FINE, 1.0, False)
    verdict, clip, _ = decided(xp, seen, above=ABOVE * long)
    assert verdict == FINE
    assert math.isclose(clip, math.exp(2 * deviation - ABOVE * long), rel_tol=1e-9)


@pytest.mark.parametrize("xp", [HOST, DEVICE], ids=["host", "device"])
@given(seen=STATISTICS)
def test_a_loss_spike_is_12_deviations_3_means_and_the_first_loss_above_or_half_of_that_for_long(xp, seen):
    least = max(12 * deviations(seen)[1], 3 * abs(seen.mean))
    at_once, lasting = max(least, seen.first), max(least, 0.5 * seen.first)
    assert decided(xp, seen, rise=BELOW * at_once)[0] == FINE
    assert decided(xp, seen, rise=ABOVE * at_once)[0] == LOSS_SPIKE
    assert decided(xp, seen, rise=BELOW * lasting, was_high=True)[::2] == (FINE, False)
    assert decided(xp, seen, rise=ABOVE * lasting, was_high=True)[::2] == (LOSS_SPIKE, True)


@pytest.mark.parametrize("xp", [HOST, DEVICE], ids=["host", "device"])
@given(seen=STATISTICS, height=st.floats(0, 1e6), twice=st.booleans())
def test_no_loss_is_a_spike_that_is_a_quarter_further_above_than_one_that_was_none(xp, seen, height, twice):
    usual = usual_rise(seen, 0.5 if twice else 1.0)
    seen, least = seen._replace(height=height), max(usual, 1.25 * height)
    assert decided(xp, seen, rise=BELOW * least, was_high=twice)[0] == FINE
    assert decided(xp, seen, rise=ABOVE * least, was_high=twice)[0] == LOSS_SPIKE


def usual_rise(seen, of_first):
    return max(12 * deviations(seen)[1], 3 * abs(seen.mean), of_first * seen.first)


@pytest.mark.parametrize("xp", [HOST, DEVICE], ids=["host", "device"])
@given(
    seen=STATISTICS,
    height=st.just(0.0) | st.floats(0, 1e4),
    rises=st.lists(st.floats(-1, 200) | st.sampled_from([math.nan, math.inf]), min_size=32, max_size=32),
    wild=st.sets(st.integers(0, 31)),
)
def test_the_height_is_that_of_the_highest_loss_that_stands_out_and_is_no_spike(
    xp, seen, height, rises, wild
):
    """Of those whose gradient is none either. What is let pass because of it does not raise it."""
    deviation = deviations(seen)[1]
    seen = seen._replace(height=height)
    allowed = limits(HOST, seen)
    losses = [seen.mean + rise * deviation for rise in rises]
    norms = [(2.0 if i in wild else 0.5) * allowed.spike for i in range(32)]
    found = take_up(
        xp, Statistics(*map(xp.number, seen)), Limits(*map(xp.number, allowed)),
        *(xp.together([xp.number(x) for x in values]) for values in (losses, norms)),
    )  # fmt: skip
    most = seen.mean + usual_rise(seen, 0.5)
    fine = [x for i, x in enumerate(losses) if i not in wild and math.isfinite(x) and x <= most]
    outstanding = [x - seen.mean for x in fine if x - seen.mean > 6 * deviation]
    assert float(found.height) == pytest.approx(max([height, *outstanding]), rel=1e-9)


def test_a_state_of_an_earlier_version_knows_of_no_height():
    judge = Judge(torch.device("cpu"))
    for _ in range(BURN_IN):
        judge.take(1.0, 1.0)
    kept = json.loads(json.dumps(judge.state_dict()))
    assert kept.pop("height") == 0.0
    other = Judge(torch.device("cpu"))
    other.load_state_dict(kept)
    assert (other.seen, other.allowed) == (judge.seen, judge.allowed)


def passing_through(losses, *, norm=1.0):
    """Verdicts on losses that come once in 300 steps, in a run that has become calm."""
    rng, judge, verdicts = random.Random(0), Judge(torch.device("cpu")), []
    for step in range(300 * len(losses)):
        judge.take(5.0 + rng.gauss(0.0, 2.5 if step < 400 else 0.2), 1.0)
        if step % 300 == 299:
            verdicts.append(judge.take(losses[step // 300], norm).verdict)
    return verdicts


def test_heavy_tails_that_were_let_pass_are_let_pass_again():
    """A sample comes once in each epoch, for the first time while the losses still vary more. One that is
    far beyond it is refused, however often it comes.
    """
    assert passing_through([30.0] * 30) == [FINE] * 30
    assert passing_through([30.0, *[60.0] * 30])[1:] == [LOSS_SPIKE] * 30


def test_losses_that_grow_by_less_than_a_quarter_each_time_do_not_get_away_with_it():
    verdicts = passing_through([30.0 * 1.2**i for i in range(30)])
    assert verdicts[0] == FINE
    assert verdicts[5:] == [LOSS_SPIKE] * 25


@pytest.mark.parametrize("xp", [HOST, DEVICE], ids=["host", "device"])
@given(seen=STATISTICS)
def test_within_the_burn_in_it_is_12_deviations_and_30_times(xp, seen):
    norm_deviation, loss_deviation = deviations(seen)
    spike = max(12 * norm_deviation, math.log(30))
    assert decided(xp, seen, above=BELOW * spike, early=True)[:2] == (FINE, 1.0)
    assert decided(xp, seen, above=ABOVE * spike, early=True)[:2] == (GRADIENT_SPIKE, 1.0)
    jump = max(12 * loss_deviation, 30 * abs(seen.mean), seen.first)
    assert decided(xp, seen, rise=BELOW * jump, early=True)[0] == FINE
    assert decided(xp, seen, rise=ABOVE * jump, early=True)[0] == LOSS_SPIKE


@pytest.mark.parametrize("xp", [HOST, DEVICE], ids=["host", "device"])
@given(seen=STATISTICS)
def test_what_is_no_number_is_never_fine(xp, seen):
    for rise, above in (
        (math.nan, 0.0),
        (math.inf, 0.0),
        (-math.inf, 0.0),
        (0.0, math.nan),
        (0.0, math.inf),
    ):
        assert decided(xp, seen, rise=rise, above=above)[0] == NOT_FINITE
