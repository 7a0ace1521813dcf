"""The step log as CSV and JSON lines."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from typing import Any, TextIO

from surefoot.record.columns import Columns


def write_csv(columns: Columns, file: TextIO) -> None:
    """One line per row under a line of names; ``permitted`` as 0 or 1."""
    writer = csv.writer(file)
    writer.writerow(columns)
    for row in _rows(columns):
        writer.writerow(int(value) if isinstance(value, bool) else value for value in row)


def write_jsonl(columns: Columns, file: TextIO) -> None:
    """One object per line; numbers that are not finite become null, as JSON has none."""
    for row in _rows(columns):
        plain = [None if isinstance(v, float) and not math.isfinite(v) else v for v in row]
        file.write(json.dumps(dict(zip(columns, plain, strict=True))) + "\n")


def _rows(columns: Columns) -> Iterator[tuple[Any, ...]]:
    return zip(*(values.tolist() for values in columns.values()), strict=True)
