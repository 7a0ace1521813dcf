"""The step log as Parquet. Needs the extra ``parquet``."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet

from surefoot.record.columns import Columns


def write_parquet(columns: Columns, path: Path) -> None:
    """One column per column, with page checksums."""
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path, write_page_checksum=True)
