"""`fit` and `steps`: a recipe, run."""

from __future__ import annotations

import atexit
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from surefoot.build import Build, build
from surefoot.export.progress import progress
from surefoot.measure.digest import digest
from surefoot.operations import Operations
from surefoot.recipe import Recipe
from surefoot.record.folder import RunFolder
from surefoot.run import RunView
from surefoot.train import steps as train_steps
from surefoot.types import Outcome

EXIT_CODES = {"finished": 0, "stopped_early": 0, "diverged": 3, "budget": 4, "preempted": 75}
"""Of the command line, by status; 1 for anything else."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a run stands after `fit`.

    status: ``finished``, ``stopped_early``, ``preempted``, ``budget`` or ``diverged``. reason: what asked
    for the stop, if anything did, or why it diverged. step: attempted updates.
    metrics: of the last validation. model: with the weights after that step. digest: SHA-256 of them.
    ledger: head of the chain over all applied sample ids. interventions: refused updates and rollbacks.
    """

    status: str
    step: int
    metrics: dict[str, float]
    model: nn.Module
    run_dir: Path
    digest: str
    ledger: str
    interventions: int
    reason: str = ""

    @property
    def exit_code(self) -> int:
        """What the command line would exit with."""
        return EXIT_CODES.get(self.status, 1)


def fit(recipe: Recipe, *, out: str | Path, operations: Operations | None = None) -> Result:
    """Trains a recipe to its end in the run directory `out`.

    Called again it continues where the run stopped; of a run that has ended it gives the result.
    SIGINT and SIGTERM stop it at the next step boundary, with status ``preempted``.

    Raises:
        UsageError: recipe, operations or directory do not fit; nothing was changed.
        StateError: the run has checkpoints, but none is sound.
    """
    operations = operations or Operations()
    built = build(recipe, RunFolder(out), operations)
    with progress(built.folder.path, on=operations.progress == "on" and built.run is not None):
        for _ in run_steps(built):
            pass
    return result(built)


def steps(
    recipe: Recipe, *, out: str | Path, operations: Operations | None = None
) -> Generator[Outcome, None, None]:
    """The same as `fit`, step by step: the body of your ``for`` runs after each attempted update.

    What the body does to the model is part of what is learned: let it be a function of
    ``outcome.step``, or the run will not repeat. Leaving the loop keeps the state. After a step that was
    compiled parameters have no `grad`.
    """
    built = build(recipe, RunFolder(out), operations or Operations())
    if built.run is not None:
        built.run.alone = False  # the body may change anything
    yield from run_steps(built)


def run_steps(built: Build) -> Iterator[Outcome]:
    """Steps of a run made ready; none if it has ended already."""
    if built.run is None:
        return
    taken = train_steps(built.run)
    try:  # a loop that is never left must be left before the interpreter ends: then no thread runs any more
        atexit.register(taken.close)
        yield from taken
    finally:
        atexit.unregister(taken.close)


def result(built: Build) -> Result:
    """How it stands."""
    state = built.state
    status = built.ended if built.run is None else built.run.status
    reason = "" if built.run is None else built.run.stop.reason or built.run.stop.budget
    if status == "diverged":
        reason = str(RunView(built.folder.path).summary()["reason"] or "")
    return Result(
        status=status,
        step=state.step,
        metrics=dict(state.metrics),
        model=state.model,
        run_dir=built.folder.path,
        digest=digest(state.model),
        ledger=state.ledger.value,
        interventions=state.num_refused + state.guard.history.count("rollback"),
        reason=reason,
    )
