"""Read a recipe from a TOML file, with overrides.

Relative paths in a recipe are relative to the folder of the recipe; in an override, to the working directory.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel

from spectune.errors import InputError
from spectune.training.recipe.recipe import EXAMPLES_HINT, Recipe, parse_recipe, section_of


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a TOML file, with overrides of the form `section.key=value` applied.

    Raises:
        InputError: The file cannot be read, a key is unknown, or a value is invalid.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", hint="recipes/ contains examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    data = with_absolute_paths(data, path.parent.resolve())
    data = _without_replaced_length(data, overrides)
    for text in overrides:
        data = _overridden(data, text)
    return parse_recipe(data, label=path.name)


def with_absolute_paths(
    data: Mapping[str, Any], folder: Path, *, section: type[BaseModel] = Recipe
) -> dict[str, Any]:
    """Return `data` with all relative paths made absolute. They are relative to `folder`."""
    return {
        key: _absolute(value, folder, section.model_fields[key].annotation)
        if key in section.model_fields
        else value
        for key, value in data.items()
    }


def _absolute(value: Any, folder: Path, annotation: Any) -> Any:
    below = section_of(annotation)
    if isinstance(value, list):
        return [_absolute(item, folder, annotation) for item in cast("list[Any]", value)]
    if below is not None:
        return with_absolute_paths(value, folder, section=below) if isinstance(value, Mapping) else value
    is_path = annotation is Path or Path in get_args(annotation)
    return str(folder / value) if is_path and isinstance(value, str) else value


def _without_replaced_length(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `data` without run.steps if an override sets run.epochs, and the other way around."""
    keys = {text.partition("=")[0].replace(" ", "") for text in overrides}
    run = data.get("run")
    if not isinstance(run, dict) or {"run.steps", "run.epochs"} <= keys:
        return data
    replaced = {"epochs"} if "run.steps" in keys else {"steps"} if "run.epochs" in keys else set[str]()
    section = cast("dict[str, Any]", run)
    return {**data, "run": {key: value for key, value in section.items() if key not in replaced}}


def _overridden(data: dict[str, Any], text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise InputError(
            f"override `{text}` is not of the form section.key=value", hint="an example: run.steps=200"
        )
    change: Any = _parsed_value(value.strip())
    for name in reversed(names):
        change = {name: change}
    return _merged(data, with_absolute_paths(change, Path.cwd()), text)


def _parsed_value(text: str) -> Any:
    """Return `text` as a TOML value, or unchanged if it is not one."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merged(base: dict[str, Any], change: dict[str, Any], text: str) -> dict[str, Any]:
    result = dict(base)
    for key, value in change.items():
        below = result.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            result[key] = _merged(below, value, text)
        elif isinstance(value, dict) and below is not None:
            raise InputError(
                f"override `{text}`: `{key}` is a value, not a section",
                hint=EXAMPLES_HINT,
            )
        else:
            result[key] = value
    return result
