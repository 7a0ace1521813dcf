"""Recipe files: Python files with a function ``recipe`` whose parameters are its options."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import from_json

from surefoot.errors import RecipeError, nearest


@dataclass(frozen=True)
class Option:
    """A parameter of ``recipe``: its name, type, default and (from ``Annotated[T, "..."]``) help."""

    name: str
    kind: str
    default: Any
    help: str


class RecipeFile:
    """A recipe file, loaded.

    Raises:
        RecipeError: there is no such file, it fails to load, or has no proper ``recipe`` function.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._function = _function(_load(path), path)
        self._model = _options_model(self._function, path)

    def options(self) -> list[Option]:
        """The options, in order."""
        return [
            Option(
                name,
                inspect.formatannotation(field.annotation),
                field.default,
                " ".join(m for m in field.metadata if isinstance(m, str)),
            )
            for name, field in self._model.model_fields.items()
        ]

    @property
    def doc(self) -> str:
        """The docstring of ``recipe``, or of the file."""
        return inspect.getdoc(self._function) or ""

    def parse(self, settings: Sequence[str]) -> dict[str, Any]:
        """Values of all options, from ``key=value`` texts and defaults.

        Raises:
            RecipeError: a text has another form, a key is unknown, or a value has the wrong type.
        """
        values: dict[str, Any] = {}
        known = self._model.model_fields
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals:
                raise RecipeError(
                    f"{setting!r} is not an option.",
                    fix=f"Write key=value; {self.path.name} knows {', '.join(known) or 'none'}.",
                )
            if name not in known:
                raise RecipeError(f"{self.path.name} has no option {name!r}.", fix=nearest(name, known))
            values[name] = _value(text, known[name].annotation)
        return self.check(values)

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        """All options: these values, and defaults for the others.

        Raises:
            RecipeError: a key is unknown, or a value has the wrong type.
        """
        known = self._model.model_fields
        for name in values:
            if name not in known:
                raise RecipeError(f"{self.path.name} has no option {name!r}.", fix=nearest(name, known))
        try:
            parsed = self._model(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise RecipeError(
                f"option {name} = {first['input']!r}: {first['msg']}.",
                fix=f"surefoot train {self.path} --help lists all options.",
            ) from None
        return {name: getattr(parsed, name) for name in known}

    def make(self, options: dict[str, Any]) -> Any:
        """Calls ``recipe``.

        Raises:
            RecipeError: it raised something, or returned no `Recipe`.
        """
        from surefoot.recipe import Recipe

        try:
            recipe = self._function(**options)
        except RecipeError:
            raise
        except Exception as error:
            raise _broken(self.path, "recipe(...)", error) from error
        if not isinstance(recipe, Recipe):
            raise RecipeError(
                f"{self.path}: recipe(...) returned a {type(recipe).__name__}.",
                fix="Return surefoot.Recipe(...).",
            )
        return recipe


def _value(text: str, annotation: Any) -> Any:
    """A text as pydantic takes it: JSON for lists and the like, else as it stands."""
    if text in ("none", "None", "null") and type(None) in get_args(annotation):
        return None
    present = [a for a in get_args(annotation) if a is not type(None)]
    if len(present) == 1 and type(None) in get_args(annotation):
        annotation = present[0]
    if get_origin(annotation) in (list, tuple, dict, set) or annotation in (list, tuple, dict):
        try:
            return from_json(text)
        except ValueError:
            return [part.strip() for part in text.split(",")]
    return text


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        what = "that is no file" if path.exists() else "there is no such file"
        raise RecipeError(f"{path}: {what}.", fix="Give the path of a recipe: a .py file.")
    name = f"recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} is not a Python file.", fix="Give a file that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and inspect look modules up there
    sys.path.insert(0, str(path.resolve().parent))  # as when Python runs a file
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _broken(path, "loading it", error) from error
    return module


def _broken(path: Path, doing: str, error: Exception) -> RecipeError:
    here = path.resolve()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == here]
    where = f" in line {frames[-1].lineno}" if frames else ""
    return RecipeError(
        f"{path}: {doing} raised {type(error).__name__}{where}: {error}",
        why=f"It says: {frames[-1].line}" if frames else "",
        fix=f"Try it by hand: python -i {path}",
    )


def _function(module: ModuleType, path: Path) -> Callable[..., Any]:
    function = getattr(module, "recipe", None)
    if not inspect.isfunction(function):
        raise RecipeError(
            f"{path} has no function named recipe.",
            fix="def recipe(lr: float = 0.1) -> surefoot.Recipe: ...",
        )
    return function


def _options_model(function: Callable[..., Any], path: Path) -> type[BaseModel]:
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise RecipeError(f"{path}: a type of recipe's parameters is unknown: {error}.") from None
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in hints or parameter.default is inspect.Parameter.empty:
            raise RecipeError(
                f"{path}: parameter {name!r} of recipe needs a type and a default.",
                why="They become the options of the command line.",
                fix=f"{name}: float = 0.1",
            )
        kind = hints[name]
        if get_origin(kind) is not Annotated:
            kind = Annotated[kind, ""]
        fields[name] = (kind, parameter.default)
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)
    return create_model("options", __config__=config, **fields)
