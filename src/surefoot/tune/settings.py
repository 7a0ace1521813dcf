"""Putting settings into the file in which people keep theirs."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit

from surefoot.errors import OperationsError


def check_writable(path: Path) -> None:
    """Whether settings can be put there, as far as can be told beforehand.

    Raises:
        OperationsError: they cannot.
    """
    try:
        if path.exists() or path.is_symlink():
            path.open("r+b").close()
        elif not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _not_written(path, error.strerror or str(error)) from None


def write_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Puts dotted settings into a TOML file; what else it holds stays, comments too.

    Raises:
        OperationsError: it is not TOML, or cannot be written.
    """
    try:
        document = tomlkit.parse(path.read_bytes()) if path.exists() else tomlkit.document()
        for key, value in settings.items():
            section, _, leaf = key.partition(".")
            document.setdefault(section, tomlkit.table())[leaf] = value
        file = path.resolve()
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            beside.write_bytes(tomlkit.dumps(document).encode())
            if file.exists():
                shutil.copymode(file, beside)
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise _not_written(path, str(error)) from None


def _not_written(path: Path, why: str) -> OperationsError:
    return OperationsError(
        f"{path} cannot be written.",
        why=f"{why}. The fastest settings go there.",
        fix="Make it a TOML file that can be, or only measure: --dry-run.",
    )
