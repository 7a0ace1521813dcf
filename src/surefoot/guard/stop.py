"""That a run is to end."""

from __future__ import annotations

from typing import NamedTuple

from surefoot.guard.detect import FINE, LOSS_SPIKE, NOT_FINITE, STATISTICS_SPIKE


class Stop(NamedTuple):
    """A verdict of the review: end the run, and why."""

    reason: str
    fix: str


def refused_for_good(num: int, step: int, verdict: int) -> Stop:
    """After so many refused updates in a row, up to a step. verdict: on the last."""
    told = f"{num} updates in a row were refused, up to step {step}: "
    if verdict in (NOT_FINITE, FINE):  # fine in itself, or nobody looked; but not what came of it
        return Stop(
            told + "loss, gradient or update is not finite whatever the batch.",
            "Lower the learning rate, clip the gradient (clip_norm), or look for values in the data that "
            "are not finite.",
        )
    what = {
        LOSS_SPIKE: "the loss stays",
        STATISTICS_SPIKE: "what goes into a normalisation layer varies",
    }.get(verdict, "the gradient stays")
    return Stop(
        told + f"{what} far above what was usual before.",
        'Look at what came into the data there, and at the rate; or Guard("watch"), if it is meant '
        "to be so.",
    )
