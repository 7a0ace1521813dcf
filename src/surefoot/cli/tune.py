"""``surefoot tune``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from surefoot.cli.train import Order, recipe_of
from surefoot.export.progress import duration_text
from surefoot.tune.compute import Tuned, told, tune_compute, write_settings


def compute(order: Order, *, dry_run: bool, out: Console, err: Console) -> None:
    """Measures, prints the table, and writes the fastest settings beside the recipe.

    Raises:
        SurefootError: nothing could be measured, or the file could not be written.
    """
    recipe, operations, _ = recipe_of(order)
    with err.status("measuring") as status:
        tuned = tune_compute(recipe, operations, say=status.update)
    out.print(_table(tuned))
    path = order.file.parent / "surefoot.toml"
    if dry_run:
        out.print(f"fastest: {told(tuned.best.settings)}", soft_wrap=True)
        return
    write_settings(tuned.best.settings, path)
    out.print(f"fastest, written to {path}: {told(tuned.best.settings)}", soft_wrap=True)
    out.print(
        "a run that goes on with other settings than it began with repeats its steps to rounding only"
    )


def _table(tuned: Tuned) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("settings", no_wrap=True)
    for column in ("ms/update", "samples/s", "to begin", f"{tuned.total:,} updates"):
        table.add_column(column, justify="right")
    table.add_column("")
    for one in tuned.tried:
        if one.why_not:
            table.add_row(told(one.settings), "-", "-", "-", "-", one.why_not)
            continue
        table.add_row(
            told(one.settings),
            f"{1e3 * one.step_s:.3g}",
            f"{one.rows / one.step_s:,.0f}",
            f"{one.prepare_s:.1f} s",
            duration_text(one.run_s(tuned.total)),
            "fastest" if one is tuned.best else "",
        )
    return table
