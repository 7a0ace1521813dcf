"""surefoot: SGD training that keeps its footing.

Names are loaded when they are first used, so that reading a run needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from surefoot.api import Result, fit, steps
    from surefoot.data.sources import Arrays, Dataset
    from surefoot.errors import (
        DataError,
        OperationsError,
        RecipeError,
        RunDirectoryError,
        StateError,
        SurefootError,
        UsageError,
    )
    from surefoot.guard.guard import Guard
    from surefoot.measure.digest import digest
    from surefoot.operations import Operations
    from surefoot.optim.gradients import clip_norm, clip_value
    from surefoot.optim.groups import Group
    from surefoot.optim.objective import supervised
    from surefoot.optim.patience import EarlyStopping
    from surefoot.optim.schedules import (
        constant,
        cosine,
        exponential,
        hold,
        inverse_sqrt,
        linear,
        one_cycle,
        plateau,
        restarts,
        step,
        warmup,
    )
    from surefoot.optim.specs import (
        SGD,
        Adadelta,
        Adafactor,
        Adagrad,
        Adam,
        AdamW,
        NAdamW,
        RMSprop,
    )
    from surefoot.recipe import Batch, Recipe, Validation
    from surefoot.replays import Replayed, replay_step
    from surefoot.run import RunView, open_run
    from surefoot.types import Outcome

_HOMES = {
    "api": "Result fit steps",
    "data.sources": "Arrays Dataset",
    "errors": "DataError OperationsError RecipeError RunDirectoryError StateError SurefootError UsageError",
    "guard.guard": "Guard",
    "measure.digest": "digest",
    "operations": "Operations",
    "optim.gradients": "clip_norm clip_value",
    "optim.groups": "Group",
    "optim.objective": "supervised",
    "optim.patience": "EarlyStopping",
    "optim.schedules": "constant cosine exponential hold inverse_sqrt linear one_cycle plateau "
    "restarts step warmup",
    "optim.specs": "SGD Adadelta Adafactor Adagrad Adam AdamW NAdamW RMSprop",
    "recipe": "Batch Recipe Validation",
    "replays": "Replayed replay_step",
    "run": "RunView open_run",
    "types": "Outcome",
}
_HOME = {name: f"surefoot.{home}" for home, names in _HOMES.items() for name in names.split()}

__all__ = [  # written out, for type checkers
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Arrays",
    "Batch",
    "DataError",
    "Dataset",
    "EarlyStopping",
    "Group",
    "Guard",
    "NAdamW",
    "Operations",
    "OperationsError",
    "Outcome",
    "RMSprop",
    "Recipe",
    "RecipeError",
    "Replayed",
    "Result",
    "RunDirectoryError",
    "RunView",
    "StateError",
    "SurefootError",
    "UsageError",
    "Validation",
    "clip_norm",
    "clip_value",
    "constant",
    "cosine",
    "digest",
    "exponential",
    "fit",
    "hold",
    "inverse_sqrt",
    "linear",
    "one_cycle",
    "open_run",
    "plateau",
    "replay_step",
    "restarts",
    "step",
    "steps",
    "supervised",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'surefoot' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
