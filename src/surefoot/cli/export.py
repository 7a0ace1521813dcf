"""``surefoot export`` and ``surefoot report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from surefoot.errors import UsageError, nearest
from surefoot.export.rows import write_csv, write_jsonl
from surefoot.record.columns import Columns
from surefoot.run import RunView

_TEXT = {"csv": write_csv, "jsonl": write_jsonl}


def export_log(columns: Columns, to: str, target: Path | None) -> None:
    """Writes a step log in a format, to a file or to standard output.

    Raises:
        UsageError: the format is unknown, or needs a file or a package.
    """
    if to not in (*_TEXT, "parquet"):
        raise UsageError(f"--to {to} is unknown.", fix=nearest(to, (*_TEXT, "parquet")))
    try:
        if to == "parquet":
            _parquet(columns, target)
        elif target is None:
            _TEXT[to](columns, sys.stdout)
        else:
            with target.open("w", newline="") as file:
                _TEXT[to](columns, file)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UsageError(
            f"{target} cannot be written: {error.strerror}.", fix="Give another file with --out."
        ) from None


def _parquet(columns: Columns, target: Path | None) -> None:
    if target is None:
        raise UsageError("--to parquet needs a file.", fix="Add --out FILE.")
    try:
        from surefoot.export.pyarrow import write_parquet
    except ImportError:
        raise UsageError("--to parquet needs pyarrow.", fix='pip install "surefoot[parquet]"') from None
    write_parquet(columns, target)


def write_report(views: Sequence[RunView], target: Path) -> None:
    """Writes the page of some runs.

    Raises:
        UsageError: it cannot be written.
    """
    from surefoot.export.report import Subject, render

    names = [view.path.resolve().name for view in views]
    if len(set(names)) < len(names):
        names = [str(view.path) for view in views]
    subjects = [
        Subject(name, view.summary(), view.identity, view.log(), view.events())
        for name, view in zip(names, views, strict=True)
    ]
    try:
        target.write_text(render(subjects), encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{target} cannot be written: {error.strerror}.", fix="Give another file with --out."
        ) from None
