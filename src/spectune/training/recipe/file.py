"""Read a recipe from a TOML file, with overrides.

Relative paths in a recipe are relative to the folder of the recipe; in an override, to the working directory.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from pydantic import BaseModel

from spectune.errors import InputError, some_of
from spectune.files.text import load_toml
from spectune.training.recipe.recipe import EXAMPLES_HINT, Recipe, parse_recipe, section_of

_LARGEST = 1024 * 1024  # bytes; a recipe with all keys and a thousand folders has a tenth of it
_PATH_HINT = "write paths with / or in single quotes: 'C:\\models\\base.safetensors'"


def load_recipe(source: Path | Mapping[str, Any] | BaseModel, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe, with overrides of the form `section.key=value` applied.

    Args:
        source: A TOML file, a dict of its sections, or a Recipe. Relative paths in the latter two are
            relative to the working directory.
        overrides: Changes of single keys.

    Raises:
        InputError: The file cannot be read, a key is unknown, or a value is invalid.
    """
    if isinstance(source, Recipe):
        data = source.model_dump(exclude_unset=True)
    elif isinstance(source, Mapping):
        data = with_absolute_paths(source, Path.cwd())
    elif isinstance(source, BaseModel):
        raise InputError(f"`recipe` is of type {type(source).__name__}: expected a path, a dict or a Recipe")
    else:
        data = read_recipe_file(source)
    data = _without_replaced_length(data, overrides)
    for text in overrides:
        data = _overridden(data, text)
    return parse_recipe(data, label=source.name if isinstance(source, Path) else "recipe")


def check_paths(recipe: Recipe) -> None:
    """Raise InputError if several files or folders of a recipe are missing; it names all of them.

    A single one is left to the code that opens it, whose message says more.
    """
    model, data = recipe.model, recipe.data
    paths = [("model.base", model.base), ("model.residual", model.residual)]
    paths += [("model.principal", model.principal), ("vae.path", recipe.vae.path)]
    paths += [("data.folders", folder) for folder in data.folders]
    paths += [("data.sets", one.path) for one in data.sets]
    paths += [("data.regularisation_folders", folder) for folder in data.regularisation_folders]
    paths += [("data.validation_folder", data.validation_folder), ("run.preview", recipe.run.preview)]
    missing = [f"{key} {path}" for key, path in paths if path is not None and not path.exists()]
    if len(missing) > 1:
        raise InputError(
            f"{len(missing)} files and folders of the recipe do not exist: {some_of(missing, 10)}",
            hint="relative paths in a recipe start at its folder",
        )


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Return the sections in a TOML file, with absolute paths."""
    text = _read_text(path)
    try:
        data = load_toml(text)
    except ValueError as error:
        hint = _backslash_hint(text, str(error))
        raise InputError(f"{path} is not valid TOML: {error}", hint=hint) from error
    return with_absolute_paths(data, path.parent.resolve())


def _read_text(path: Path) -> str:
    """Read UTF-8 with or without a byte order mark, or UTF-16, which PowerShell writes with `>`."""
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", hint="recipes/ contains examples") from None
    except (OSError, ValueError) as error:  # ValueError: no path has such a character
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    if len(raw) > _LARGEST:
        raise InputError(f"{path} is larger than {_LARGEST // 1024} KiB: expected a recipe in TOML")
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return raw.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not {encoding.removesuffix('-sig').upper()} text: line {line} has the byte "
            f"0x{raw[error.start]:02x}",
            hint="save the recipe as UTF-8",
        ) from error


def _backslash_hint(text: str, error: str) -> str | None:
    """Return a hint if the wrong line has a backslash in double quotes, as in a path of Windows."""
    match = re.search(r"at line (\d+)", error)
    line = text.splitlines()[int(match[1]) - 1] if match else ""
    return _PATH_HINT if re.search(r'"[^"]*\\', line) else None


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
    if not is_path or not isinstance(value, str):
        return value
    if any(character < " " for character in value):  # TOML reads "C:\new" with a line break
        raise InputError(f"the path {value!r} contains a control character", hint=_PATH_HINT)
    return str(folder / value)


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
    change: Any = _listed(_parsed_value(value.strip()), names)
    for name in reversed(names):
        change = {name: change}
    return _merged(data, with_absolute_paths(change, Path.cwd()), text)


def _parsed_value(text: str) -> Any:
    """Return `text` as a TOML value, or unchanged if it is not one."""
    try:
        return load_toml(f"value = {text}")["value"]
    except ValueError:
        return text


def _listed(value: Any, names: Sequence[str]) -> Any:
    """Return words separated by commas as a list, for a key that holds a list; other values unchanged.

    A TOML list of strings needs quotes inside of quotes, which cmd, PowerShell and bash write differently.
    PowerShell 5 removes the inner ones: [unet,te1] is read too.
    """
    section: type[BaseModel] | None = Recipe
    for name in names[:-1]:
        field = None if section is None else section.model_fields.get(name)
        section = None if field is None else section_of(field.annotation)
    field = None if section is None else section.model_fields.get(names[-1])
    if field is None or get_origin(field.annotation) is not tuple or not isinstance(value, str):
        return value
    is_path = Path in get_args(field.annotation)  # a path may contain commas
    words = value.removeprefix("[").removesuffix("]").split(",")
    return [value] if is_path else [word.strip() for word in words]


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
