"""``surefoot chaos``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from surefoot.api import EXIT_CODES
from surefoot.build import build
from surefoot.cli import tables
from surefoot.cli.recipe_file import RecipeFile
from surefoot.cli.train import Order, recipe_of
from surefoot.errors import OperationsError, nearest
from surefoot.launch.chaos import CANNOT, GameDay, Played, survived
from surefoot.launch.faults import FAULTS, inject
from surefoot.record.folder import RunFolder
from surefoot.train import steps


def play(
    order: Order,
    faults: Sequence[str],
    run: Path | None,
    at: int | None,
    *,
    as_json: bool,
    out: Console,
    err: Console,
) -> int:
    """A game day; the exit code: 0 if all faults were survived.

    Raises:
        SurefootError: it could not begin.
    """
    for name in faults:
        if name not in FAULTS:
            raise OperationsError(f"--fault {name!r} is not known.", fix=nearest(name, FAULTS))
    RecipeFile(order.file).parse(order.settings)  # complain before the work
    folder = order.out or Path(tempfile.mkdtemp(prefix="surefoot-chaos-"))

    def train(to: Path, fault: str, step: int) -> int:
        return _train(replace(order, out=to), fault, step, err)

    def say(text: str) -> None:
        err.print(text, markup=False, soft_wrap=True)

    day = GameDay(train, folder, original=run, at=at, say=say)
    day.undisturbed()
    played = [day.play(name) for name in faults or FAULTS]
    if as_json:
        tables.print_json([one.to_json() for one in played])
    else:
        out.print(_table(played))
        out.print(f"the runs lie in {folder}", soft_wrap=True)
    return 0 if survived(played) else 1


def _table(played: Sequence[Played]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("fault", "survived", "end", "repeated", "extra s", "interventions", "note"):
        table.add_column(
            column, justify="right" if column in ("repeated", "extra s", "interventions") else "left"
        )
    for one in played:
        said = {True: Text("yes", style="green"), False: Text("no", style="red"), None: Text("not run")}
        end = (
            "the same bits"
            if one.same_bits
            else ", ".join(
                f"{name} {value:.4g} ({one.clean[name]:.4g})"
                for name, value in one.metrics.items()
                if name in one.clean and (name != "train_loss" or len(one.metrics) == 1)
            )
        )
        numbers = ["-"] * 3 if one.survived is None else [
            f"{one.repeated:,}", f"{one.extra_s:.1f}", str(one.interventions)
        ]  # fmt: skip
        table.add_row(one.fault, said[one.survived], end, *numbers, one.why)
    return table


def _train(order: Order, fault: str, at: int, err: Console) -> int:
    """A training of a game day, in a process of its own; the exit code."""
    recipe, operations, origin = recipe_of(order)
    assert order.out is not None
    built = build(recipe, RunFolder(order.out), operations, origin=origin)
    if built.run is None:
        return 0
    try:
        meddle = inject(fault, built.run, at) if fault else None
    except OperationsError as error:
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        return CANNOT
    built.run.alone = meddle is None
    for outcome in steps(built.run):
        if meddle is not None:
            meddle(outcome.step + 1)
    return EXIT_CODES.get(built.run.status, 1)
