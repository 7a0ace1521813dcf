"""Putting right what is damaged in a run directory beside its checkpoints, so that the run can go on."""

from __future__ import annotations

import time
from typing import Any

from surefoot.checkpoint.kept import list_checkpoints
from surefoot.errors import FormatError, RunDirectoryError, StateError
from surefoot.record.folder import RunFolder
from surefoot.record.rows import read_log


def identity_of(
    folder: RunFolder, identity: dict[str, Any], recipe: str
) -> tuple[dict[str, Any], list[str]]:
    """What ``run.json`` says. If it is damaged, and a checkpoint says that the run is of this very recipe,
    it is written anew.
    """
    try:
        return folder.identity(), []
    except FormatError:
        raise
    except (StateError, RunDirectoryError) as error:
        for checkpoint in reversed(list_checkpoints(folder.checkpoints)):
            try:
                manifest = checkpoint.manifest()
            except StateError:
                continue
            if manifest["recipe"] == recipe:
                if folder.identity_file.exists():
                    folder.quarantine.mkdir(exist_ok=True)
                    folder.identity_file.rename(folder.quarantine / f"run-{time.time_ns()}.json")
                folder.create(identity, run=manifest["run"])
                return folder.identity(), [f"{error.what} It was made again from the recipe."]
        raise


def put_away_log(folder: RunFolder) -> list[str]:
    """Moves a step log of which nothing can be read into quarantine: training needs none of it."""
    try:
        read_log(folder.steps)
    except FormatError:
        raise
    except StateError as error:
        folder.quarantine.mkdir(exist_ok=True)
        (folder.steps / "rows.bin").rename(folder.quarantine / f"rows-{time.time_ns()}.bin")
        return [f"{error.what} Moved to {folder.quarantine.name}/; the log begins anew."]
    return []
