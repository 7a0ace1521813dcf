"""Operations: how a recipe is run. None of it changes what is learned.

Filled, from weakest to strongest, by defaults, ``surefoot.toml`` beside the recipe, environment
variables ``SUREFOOT_...`` (``compute.compile`` is ``SUREFOOT_COMPUTE_COMPILE``), and flags.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from surefoot.errors import OperationsError, nearest
from surefoot.types import duration

_PREFIX = "SUREFOOT_"
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Compute(_Section):
    """How the arithmetic is done."""

    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile for forward pass and loss; auto is off"
    )
    micro_batch: Positive | None = Field(
        None, description="rows through the model at once, below the recipe's batch.micro"
    )
    threads: Positive | None = Field(None, description="threads of torch's CPU kernels")
    deterministic: bool = Field(True, description="on a GPU, only kernels whose results repeat bit for bit")


class DataOperations(_Section):
    """How samples come to the model."""

    workers: Count = Field(0, description="processes that fetch from a Dataset; 0: none")
    prefetch: Positive = Field(2, description="batches each of them keeps ready")


class CheckpointOperations(_Section):
    """How often the state is kept, and for how long."""

    every: int | str = Field("1min", description='updates, "1ep", "1e6samples", "5%" or "5min"')
    keep_last: Positive = Field(3, description="checkpoints that stay")

    @field_validator("every")
    @classmethod
    def _is_duration(cls, value: int | str) -> int | str:
        try:
            duration(value, name="checkpoint.every")
        except Exception as error:
            raise ValueError(str(error)) from None
        return value


class Operations(_Section):
    """How a recipe is run; see the module.

    Raises:
        OperationsError: a key is unknown, or a value of the wrong type or out of range.
    """

    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto: cuda if there is one")
    progress: Literal["auto", "on", "off"] = Field(
        "auto", description="progress on the terminal; auto: on for the command, off for fit()"
    )
    compute: Compute = Compute()
    data: DataOperations = DataOperations()
    checkpoint: CheckpointOperations = CheckpointOperations()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _explain(error) from None


def known_keys() -> dict[str, Any]:
    """Dotted keys with their pydantic fields."""
    return dict(_walk(Operations, ""))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _walk(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def gather(toml: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any]) -> Operations:
    """Operations from a file (if it exists), environment variables and dotted flags.

    Raises:
        OperationsError: naming the source and the nearest known key.
    """
    values: dict[str, Any] = {}
    for source, settings in (
        (f"{toml}", _from_toml(toml)),
        ("environment", _from_environment(environment)),
        ("--set", flags),
    ):
        for key, value in settings.items():
            if key not in known_keys():
                raise OperationsError(f"{source}: unknown key {key!r}.", fix=nearest(key, known_keys()))
            section: dict[str, Any] = values
            *path, leaf = key.split(".")
            for part in path:
                section = section.setdefault(part, {})
            section[leaf] = value
    return Operations(**values)


def _from_toml(path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {}
    try:
        tables = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperationsError(f"{path} is not TOML: {error}") from None
    return dict(_dotted(tables, ""))


def _dotted(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    names = {key.replace(".", "_").upper(): key for key in known_keys()}
    found = {}
    for name, value in environment.items():
        if name.startswith(_PREFIX):
            plain = name.removeprefix(_PREFIX).replace("__", "_")
            if plain not in names:
                raise OperationsError(
                    f"environment: {name} sets nothing.",
                    fix=nearest(name, (_PREFIX + known for known in names)),
                )
            found[names[plain]] = value
    return found


def _explain(error: ValidationError) -> OperationsError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return OperationsError(f"operations: unknown key {key!r}.", fix=nearest(key, known_keys()))
    return OperationsError(f"operations: {key} = {first['input']!r}: {first['msg']}.")
