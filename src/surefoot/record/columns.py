"""The columns of the step log. Readers depend on these names and on nothing else of the loop."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]


class Column(NamedTuple):
    """A column of the step log: eight bytes in each row."""

    name: str
    kind: Literal["q", "d"]  # int64, float64
    meaning: str


COLUMNS = (
    Column("step", "q", "attempted update, from 0"),
    Column("attempt", "q", "process life of the run that made this row, from 1"),
    Column("epoch", "q", "epoch of the batch's first sample, from 0"),
    Column("samples", "q", "samples consumed by the run so far, this update included"),
    Column("batch_samples", "q", "samples in this batch; holes do not count"),
    Column("micro_batches", "q", "forward and backward passes in this update"),
    Column("permitted", "q", "1 if the update was applied, 0 if it was refused"),
    Column(
        "verdict",
        "q",
        "0 fine, 1 not finite, 2 gradient spike, 3 loss spike, 4 sat out, 5 statistics",
    ),
    Column("lr", "d", "learning rate of the first parameter group"),
    Column("loss", "d", "weighted mean over the batch, before the update"),
    Column("grad_norm", "d", "global 2-norm of the gradient, before clipping"),
    Column("guard_clip", "d", "factor by which the guard shortened the gradient; mostly 1"),
    Column("update_ratio", "d", "2-norm of the change / 2-norm of the weights; NaN: not measured"),
    Column("loss_scale", "d", "factor on the loss in fp16; 1 otherwise"),
    Column("data_wait_s", "d", "seconds the loop waited for the batch"),
    Column("step_s", "d", "seconds from one row to the next, validation and checkpoints left out"),
    Column("wall_s", "d", "seconds from one row to the next, all included"),
    Column("cost", "d", "price of these seconds, as operations state it; 0 if they do not"),
    Column("time_s", "d", "seconds since the epoch of Unix when the step ended"),
)


def lineage(columns: Columns) -> Columns:
    """The rows that the weights came from: one per step, in order.

    A run that went back to a checkpoint repeats steps; of rows with the same step the last counts.
    """
    steps = columns["step"]
    if len(steps) == 0:
        return columns
    least_after = np.minimum.accumulate(steps[::-1])[::-1]
    keep = np.ones(len(steps), bool)
    keep[:-1] = steps[:-1] < least_after[1:]
    return columns if keep.all() else {name: values[keep] for name, values in columns.items()}
