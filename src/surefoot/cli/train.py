"""``surefoot train``."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from surefoot.api import EXIT_CODES, Result, result, run_steps
from surefoot.build import build
from surefoot.cli import tables
from surefoot.cli.recipe_file import RecipeFile
from surefoot.errors import RunDirectoryError
from surefoot.export.progress import duration_text, progress
from surefoot.guard.hang import stacks_if_stuck
from surefoot.operations import Operations, gather, seconds
from surefoot.recipe import Recipe
from surefoot.record.folder import RunFolder
from surefoot.run import open_run


@dataclass(frozen=True)
class Order:
    """What the command line asks for. flags: dotted operations keys to values."""

    file: Path
    settings: Sequence[str]
    out: Path | None
    fresh: bool
    flags: dict[str, Any]


def run_order(order: Order, out: Console, err: Console) -> int:
    """Trains as told; the exit code.

    Raises:
        SurefootError: nothing was trained.
    """
    recipe, operations, origin = recipe_of(order)
    folder = RunFolder(order.out or Path("runs") / order.file.stem)
    if order.fresh and order.out is None:
        raise RunDirectoryError(
            "--fresh needs --out.",
            why="It moves what lies there aside, so you say where.",
            fix=f"Add --out {folder.path}.",
        )

    def say(text: str) -> None:
        err.print(text, markup=False, soft_wrap=True)

    built = build(recipe, folder, operations, origin=origin, fresh=order.fresh, say=say)
    command = shlex.join(["surefoot", *sys.argv[1:]])
    if built.run is None:
        done = result(built)
        ended = f"{folder.path} has ended already: {done.status} after {done.step:,} updates"
        for note in built.notes:
            say(note)
        if operations.profile:
            say("no profile: the run has ended")
        out.print(ended, soft_wrap=True)
        _verdict(done, None, out, command)
        return done.exit_code
    err.print(tables.groups(built.groups))
    for note in built.notes:
        say(note)
    begun = time.monotonic()
    with progress(folder.path, on=operations.progress != "off", console=err):
        for _ in run_steps(built):
            pass
    done = result(built)
    for event in open_run(folder.path).events():
        if event["attempt"] != built.run.record.attempt:
            continue
        if event["kind"] == "not_profiled":
            say(f"no profile: {event['reason']}")
        if event["kind"] == "profiled":
            steps = f"steps {event['begins']:,} to {event['step'] - 1:,}"
            say(f"profile of {steps}: {folder.path / event['file']}")
            say("  for ui.perfetto.dev or chrome://tracing; a table is beside it, .txt")
    _verdict(done, time.monotonic() - begun, out, command)
    return EXIT_CODES.get(done.status, 1)


def recipe_of(order: Order) -> tuple[Recipe, Operations, dict[str, Any]]:
    """The recipe and operations that are asked for, and what is to be recorded of where they came from.

    Raises:
        UsageError: they are not in order.
    """
    toml = order.file.parent / "surefoot.toml"
    operations = gather(toml, os.environ, order.flags)
    with stacks_if_stuck(seconds(operations.hang_after, name="hang_after")):
        recipe_file = RecipeFile(order.file)
        options = recipe_file.parse(order.settings)
        recipe = recipe_file.make(options)
    return (
        recipe,
        operations,
        {
            "file": order.file.name,
            "path": str(order.file.resolve()),
            "options": options,
        },
    )


def _verdict(done: Result, seconds: float | None, out: Console, command: str) -> None:
    """Says how the run stands, and what to do next."""
    took = "" if seconds is None else f" in {duration_text(seconds)}"
    said = {
        "finished": f"finished: {done.step:,} updates{took}",
        "stopped_early": f"stopped early: no improvement, after {done.step:,} updates{took}",
        "preempted": f"interrupted after {done.step:,} updates; run the same command to continue",
        "diverged": f"diverged after {done.step:,} updates: {done.reason}",
        "budget": f"stopped after {done.step:,} updates: {done.reason}; raise it and run the same command "
        "again to continue",
    }
    colors = {"finished": "bold green", "stopped_early": "bold green", "diverged": "bold red"}
    out.print(
        said.get(done.status, done.status), soft_wrap=True, style=colors.get(done.status, "bold yellow")
    )
    for name, value in done.metrics.items():
        out.print(f"  validation {name}: {value:.5g}")
    if done.interventions:
        out.print(f"  refused updates and rollbacks: {done.interventions}", style="yellow")
    out.print(f"  digest {done.digest[:16]}  ledger {done.ledger[:16]}")
    path = shlex.quote(str(done.run_dir))
    if done.status == "preempted":
        out.print(f"next: {command}", markup=False, soft_wrap=True)
        return
    out.print(f"next: surefoot show {path}", markup=False, soft_wrap=True)
    out.print(f"      surefoot report {path}", markup=False, soft_wrap=True)
    out.print(f"      surefoot verify {path}", markup=False, soft_wrap=True)
    out.print(f"      surefoot export {path} --to csv", markup=False, soft_wrap=True)
