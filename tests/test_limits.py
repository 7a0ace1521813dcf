"""What the guard's limits are, by what its documentation says of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surefoot.guard.arithmetic import Numbers, Tensors
from surefoot.guard.detect import FINE, GRADIENT_SPIKE, LOSS_SPIKE, NOT_FINITE, Statistics, judge, limits

BELOW, ABOVE = 0.999, 1.001
HOST, DEVICE = Numbers(), Tensors(torch.device("cpu"))
STATISTICS = st.builds(
    Statistics,
    log_mean=st.floats(-20, 20),
    log_var=st.floats(0, 4),
    mean=st.floats(-10, 100),
    var=st.floats(0, 1e4),
    first=st.floats(0.01, 100),
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
