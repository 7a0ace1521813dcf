"""Operations: how a recipe is run. None of it changes what is learned.

Filled, from weakest to strongest, by defaults, ``surefoot.toml`` beside the recipe, environment
variables ``SUREFOOT_...`` (``compute.compile`` is ``SUREFOOT_COMPUTE_COMPILE``), and flags.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from surefoot.errors import OperationsError, RecipeError, nearest
from surefoot.types import duration

_PREFIX = "SUREFOOT_"


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


Count = Annotated[int, BeforeValidator(_no_flag), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(_no_flag), Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Compute(_Section):
    """How the arithmetic is done."""

    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="the whole step, or as much as can be, as one compiled function; auto: small models on "
        "a CPU in long runs",
    )
    micro_batch: Positive | None = Field(
        None, description="rows through the model at once, below the recipe's batch.micro"
    )
    threads: Positive | None = Field(None, description="threads of torch's CPU kernels")
    layout: Literal["contiguous", "channels_last"] = Field(
        "contiguous", description="how the weights of convolutions lie in memory"
    )
    deterministic: bool = Field(True, description="on a GPU, only kernels whose results repeat bit for bit")


class DataOperations(_Section):
    """How samples come to the model."""

    workers: Count = Field(0, description="processes that fetch from a Dataset; 0: none")
    timeout: str = Field("10min", description="a worker that takes longer for a batch is replaced")
    prefetch: Positive = Field(2, description="batches each of them keeps ready")

    @field_validator("timeout")
    @classmethod
    def _is_time(cls, value: str) -> str:
        seconds(value, name="data.timeout")
        return value


class CheckpointOperations(_Section):
    """How often the state is kept, and for how long."""

    every: int | str = Field(
        "auto", description='updates, "1ep", "1e6samples", "5%", "5min", or auto: by overhead and risk'
    )
    overhead: Annotated[float, Field(gt=0, le=1)] = Field(
        0.02, description="auto: share of the time that checkpoints may take"
    )
    risk: str = Field("10min", description="auto: the longest time between two, whatever they cost")
    grace: str = Field("5min", description="how long a run asked to stop may take to write its state")
    keep_last: Positive = Field(
        3, description="newest checkpoints that stay; never fewer than 2 sound ones"
    )
    keep_best: Count = Field(0, description="besides, the best by keep_metric")
    keep_metric: str = Field("loss", description="a validation metric")
    keep_mode: Literal["min", "max"] = Field("min", description="whether smaller or larger is better")
    keep_per: str | None = Field(None, description='besides, the first of each such time: "24h"')
    keep_for: str | None = Field(None, description='nothing older stays: "30d"; pins and the newest do')

    @field_validator("every")
    @classmethod
    def _is_duration(cls, value: int | str) -> int | str:
        if value != "auto":
            _checked(value, "checkpoint.every")
        return value

    @field_validator("risk", "grace", "keep_per", "keep_for")
    @classmethod
    def _is_time(cls, value: str | None) -> str | None:
        if value is not None:
            seconds(value, name="checkpoint")
        return value


class BudgetOperations(_Section):
    """Limits of the whole run, all its attempts. Reached, it stops with a checkpoint and exit code 4."""

    time: str | None = Field(None, description='wall time: "2h"')
    updates: Positive | None = Field(None, description="attempted updates")
    cost: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="money, at price_per_hour"
    )
    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="of this machine"
    )

    @field_validator("time")
    @classmethod
    def _is_time(cls, value: str | None) -> str | None:
        if value is not None:
            seconds(value, name="budget.time")
        return value

    @model_validator(mode="after")
    def _has_price(self) -> BudgetOperations:
        if self.cost is not None and not self.price_per_hour:
            raise ValueError("budget.cost needs budget.price_per_hour")
        return self


class IncidentOperations(_Section):
    """What is written down when something goes wrong."""

    samples: bool = Field(
        False, description="the batch in which an incident began goes into its bundle; it may be private"
    )


def _checked(value: int | str, name: str) -> None:
    try:
        duration(value, name=name)
    except Exception as error:
        raise ValueError(str(error)) from None


def seconds(text: str, *, name: str) -> float:
    """A duration that is a time, in seconds.

    Raises:
        ValueError: it is none.
    """
    try:
        length = duration(text, name=name)
    except RecipeError as error:
        raise ValueError(error.what) from None
    if length.unit != "s":
        raise ValueError(f'{text!r} is not a time, such as "90s", "5min", "2h" or "30d"')
    return float(length.value)


class Operations(_Section):
    """How a recipe is run; see the module.

    Raises:
        OperationsError: a key is unknown, or a value of the wrong type or out of range.
    """

    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto: cuda if there is one")
    progress: Literal["auto", "on", "off"] = Field(
        "auto", description="progress on the terminal; auto: on for the command, off for fit()"
    )
    profile: Count = Field(0, description="steps that torch's profiler records, into profiles/ of the run")
    compute: Compute = Compute()
    data: DataOperations = DataOperations()
    checkpoint: CheckpointOperations = CheckpointOperations()
    budget: BudgetOperations = BudgetOperations()
    incidents: IncidentOperations = IncidentOperations()
    hang_after: str = Field(
        "10min", description="without a step or batch, after which the threads' stacks are written down"
    )

    @field_validator("hang_after")
    @classmethod
    def _is_time(cls, value: str) -> str:
        seconds(value, name="hang_after")
        return value

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
            within = [known for known in known_keys() if known.startswith(f"{key}.")]
            if within:
                raise OperationsError(
                    f"{source}: {key} = {value!r}, but {key} is a section.",
                    fix=f"Give one of its keys: {', '.join(within)}.",
                )
            if key not in known_keys():
                raise OperationsError(f"{source}: unknown key {key!r}.", fix=nearest(key, known_keys()))
            section: dict[str, Any] = values
            *path, leaf = key.split(".")
            for part in path:
                section = section.setdefault(part, {})
            section[leaf] = value
    return Operations(**values)


def keys_set(environment: Mapping[str, str], flags: Mapping[str, Any]) -> set[str]:
    """Dotted keys that an environment and flags give."""
    return {*_from_environment(environment), *flags}


def _from_toml(path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {}
    try:
        tables = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperationsError(
            f"{path} is not TOML: {error}", fix='Mend it; sections are [compute], texts are "auto".'
        ) from None
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
    return OperationsError(
        f"operations: {key} = {first['input']!r}: {first['msg']}.",
        fix="surefoot train --help lists all keys.",
    )
