"""``surefoot replay``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from surefoot.cli import tables
from surefoot.cli.recipe_file import RecipeFile
from surefoot.errors import OperationsError, RecipeError
from surefoot.operations import gather
from surefoot.replays import Replayed, replay_step, worst
from surefoot.run import RunView, open_run


def replay_run(
    path: Path,
    step: int,
    file: Path | None,
    target: Path | None,
    flags: dict[str, Any],
    out: Console,
    err: Console,
    as_json: bool,
) -> int:
    """Replays a step of a run and shows what came of it; the exit code.

    Raises:
        SurefootError: it could not be replayed.
    """
    view = open_run(path)
    recipe_file = RecipeFile(file or _recipe_of(view))
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        what = "is a folder" if target.is_dir() else f"there is no folder {target.parent}"
        raise OperationsError(f"--out {target}: {what}.", fix="Give a file.")
    operations = gather(recipe_file.path.parent / "surefoot.toml", os.environ, flags)
    recipe = recipe_file.make(recipe_file.check(view.identity["origin"].get("options", {})))
    done = replay_step(
        recipe, path, step=step, operations=operations, say=lambda text: err.print(text, markup=False)
    )
    told = done.to_json()
    if target is not None:
        try:
            target.write_text(json.dumps(tables.strict(told), indent=1) + "\n")
        except OSError as error:
            err.print(f"{target} could not be written: {error.strerror}", markup=False, style="yellow")
    if as_json:
        tables.print_json(told)
    else:
        _show(done, path, out)
    return 1 if done.verdict == "differs" else 0


def _recipe_of(view: RunView) -> Path:
    """Where the recipe file was when the run began, or a file of its name here."""
    origin = view.identity["origin"]
    if not origin.get("file"):
        raise RecipeError(
            f"{view.path} was not begun from a recipe file.",
            fix="Give one whose recipe(...) returns the same Recipe: --recipe FILE; or call "
            "surefoot.replay_step(recipe, path, step=...).",
        )
    for path in (Path(origin.get("path", origin["file"])), Path(origin["file"])):
        if path.is_file():
            return path
    raise RecipeError(f"{origin.get('path', origin['file'])} is not there any more.", fix="--recipe FILE")


_SAID = {
    "reproduced": ("reproduced: each row has the bits of the log", "bold green"),
    "agrees": ("agrees to rounding; the environment is another", "bold yellow"),
    "differs": ("differs", "bold red"),
}


def _show(done: Replayed, path: Path, out: Console) -> None:
    said, color = _SAID[done.verdict]
    if done.verdict == "differs":
        said = f"differs from step {done.differences[0].step:,} on"
        said += "" if done.changed else ": a fault of the machine is likely, then or now"
    out.print(f"step {done.step:,} of {path}: {said}", style=color, markup=False, soft_wrap=True)
    for one in done.differences:
        out.print(f"  {one.column}: {one.logged!r} in the log, {one.replayed!r} now", markup=False)
    if done.differences:
        out.print(f"  largest relative difference in any row: {done.rounding:.3g}")
    for name, (then, now) in done.changed.items():
        out.print(f"  {name}: {then} then, {now} now", markup=False, soft_wrap=True)
    row = done.row
    applied = "applied" if row["permitted"] else "refused"
    out.print(
        f"  epoch {row['epoch']:g}, {row['batch_samples']:g} samples, {applied}: lr {row['lr']:.6g}, "
        f"loss {row['loss']:.6g}, gradient norm {row['grad_norm']:.6g}"
    )
    ids = _table("highest losses", "sample", "loss")
    for sample, loss in worst(done):
        ids.add_row(str(sample), f"{loss:.6g}")
    layers = _table("gradient by parameter", "name", "norm", "share of the square")
    total = sum(norm * norm for norm in done.layers.values() if norm == norm)
    for name, norm in done.layers.items():
        layers.add_row(name, f"{norm:.6g}", f"{100 * norm * norm / total:.1f} %" if total > 0 else "-")
    inputs = _table("inputs", "name", "type", "shape", "least", "largest", "mean", "std", "not finite")
    for tensor in done.inputs:
        numbers = [f"{tensor[k]:.6g}" if k in tensor else "-" for k in ("least", "largest", "mean", "std")]
        shape = " x ".join(map(str, tensor["shape"])) if "shape" in tensor else "-"
        inputs.add_row(tensor["name"], tensor["type"], shape, *numbers, str(tensor.get("not_finite", "-")))
    for shown in (ids, layers, inputs):
        out.print()
        out.print(shown)


def _table(title: str, *columns: str) -> Table:
    """An empty one with these columns, numbers to the right."""
    made = Table(title=title, box=None, padding=(0, 2, 0, 0), header_style="bold", title_justify="left")
    for column in columns:
        left = column in ("name", "type", "sample")
        made.add_column(column, justify="left" if left else "right")
    return made
