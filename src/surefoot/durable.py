"""Durability of names: what parts that write files share."""

import os
from pathlib import Path


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable against a power cut.

    Raises:
        OSError: the disk does not take them.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
