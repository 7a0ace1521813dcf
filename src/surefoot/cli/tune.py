"""``surefoot tune``."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

from surefoot.cli.train import Order, recipe_of
from surefoot.export.progress import duration_text
from surefoot.operations import keys_set
from surefoot.tune.compute import VARIED, Tuned, told, tune_compute
from surefoot.tune.settings import check_writable, write_settings

_COMPILED = {"step": "whole step", "forward": "forward pass and losses", "captured": "one CUDA graph"}


def compute(order: Order, *, dry_run: bool, out: Console, err: Console) -> None:
    """Measures, prints the table, and writes the fastest settings beside the recipe.

    Raises:
        SurefootError: nothing could be measured, or the file could not be written.
    """
    recipe, operations, _ = recipe_of(order)
    path = order.file.parent / "surefoot.toml"
    if not dry_run:
        check_writable(path)
    held = sorted(set(VARIED) & keys_set(os.environ, order.flags))
    with err.status("measuring") as status:
        tuned = tune_compute(recipe, operations, held=held, say=status.update)
    out.print(_table(tuned))
    if len(tuned.tried) > 1:
        out.print("beside: time of the whole run, over that of the best above it measured again in turns")
    for key in held:
        out.print(f"not varied, since it is set: {key}")
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
    for column in ("ms/update", "to begin", f"{tuned.total:,} updates", "beside"):
        table.add_column(column, justify="right")
    table.add_column("")
    for one in tuned.tried:
        if one.why_not:
            table.add_row(told(one.settings), "-", "-", "-", "-", one.why_not)
            continue
        notes = [_COMPILED[one.compiled]] if one.compiled else []
        table.add_row(
            told(one.settings),
            f"{1e3 * one.step_s:.3g}",
            f"{one.prepare_s:.1f} s",
            duration_text(one.run_s(tuned.total)),
            "" if one is tuned.tried[0] else f"{one.beside:.2f}",
            ", ".join([*notes, "fastest"] if one is tuned.best else notes),
        )
    return table
