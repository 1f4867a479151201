"""A training run as a file: TOML with the sections of sections.py.

Relative paths in a recipe are relative to its folder, those in overrides to the working directory.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast, get_args

from pydantic import BaseModel, ValidationError, model_validator

from spectune.errors import InputError, did_you_mean
from spectune.training.optim import OPTIMIZERS
from spectune.training.recipe.sections import (
    DataSection,
    LossSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    RunSection,
    Section,
    VaeSection,
)


class Recipe(Section):
    model: ModelSection
    vae: VaeSection = VaeSection()
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    run: RunSection

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.objective.kind == "flow" and self.loss.weighting not in ("none", "edm2"):
            raise ValueError(
                f'loss.weighting = "{self.loss.weighting}" weighs by signal-to-noise ratio, '
                "which flow does not use"
            )
        if self.objective.converts and self.model.form != "delta":
            raise ValueError(
                'objective.start, teacher and bridge_steps need model.form = "delta", which keeps the base'
            )
        if self.objective.kind in ("eps", "flow") and self.loss.scale_v_like_noise:
            raise ValueError(f'loss.scale_v_like_noise is for kind = "v", not for "{self.objective.kind}"')
        frozen = [part for part in self.optimizer.part_learning_rates if part not in self.model.parts]
        if frozen:
            raise ValueError(f"optimizer.part_learning_rates names {frozen[0]}, which model.parts leaves out")
        if self.run.ema_decay is not None and self.optimizer.traits.schedule_free:
            raise ValueError(f"run.ema_decay: {self.optimizer.name} saves an average of its steps already")
        if self.run.trained_precision == "bf16" and not self.optimizer.traits.rounds_stochastically:
            good = [name for name, kind in OPTIMIZERS.items() if kind.rounds_stochastically]
            raise ValueError(
                f'run.trained_precision = "bf16" needs an optimiser that rounds stochastically, or small '
                f"updates are lost; {self.optimizer.name} with these options does not, {', '.join(good)} can"
            )
        if "text" in self.run.offload and not self.caches_text:
            raise ValueError(
                'run.offload = ["text"] needs cached captions: freeze the encoders and keep captions fixed'
            )
        if "vae" in self.run.offload and not self.data.caches_latents:
            raise ValueError('run.offload = ["vae"] needs cached latents')
        trained = [part for part in self.model.parts if part != "unet"]
        if self.data.cache_text and trained:
            raise ValueError(
                f"data.cache_text needs frozen text encoders, but model.parts trains {', '.join(trained)}"
            )
        return self

    @property
    def caches_latents(self) -> bool:
        return self.data.caches_latents

    @property
    def caches_text(self) -> bool:
        if self.data.cache_text is not None:
            return self.data.cache_text
        return self.model.parts == ("unet",) and not self.data.caption.varies


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `section.key=value` overrides applied.

    Raises InputError for unreadable files, unknown keys and values that do not fit.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", hint="recipes/ holds examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    data = with_absolute_paths(data, path.parent.resolve())
    data = _without_replaced_length(data, overrides)
    return parse_recipe(_overridden(data, overrides), label=path.name)


def parse_recipe(data: Mapping[str, Any], *, label: str = "recipe") -> Recipe:
    """A checked recipe from nested mappings; `label` names it in messages."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explained(error, label) from error


def _overridden(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for text in overrides:
        key, equals, value = text.partition("=")
        names = [name.strip() for name in key.split(".")]
        if not equals or not all(names):
            raise InputError(
                f"override `{text}` is not of the form section.key=value", hint="--set run.steps=200"
            )
        single: Any = _parsed_value(value.strip())
        for name in reversed(names):
            single = {name: single}
        data = _merged(data, with_absolute_paths(single, Path.cwd()), text)
    return data


def _without_replaced_length(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`data` without the length of the run that an override gives in the other unit."""
    keys = {text.partition("=")[0].replace(" ", "") for text in overrides}
    run = data.get("run")
    if not isinstance(run, dict) or {"run.steps", "run.epochs"} <= keys:
        return data
    replaced = {"epochs"} if "run.steps" in keys else {"steps"} if "run.epochs" in keys else set[str]()
    section = cast("dict[str, Any]", run)
    return {**data, "run": {key: value for key, value in section.items() if key not in replaced}}


def _parsed_value(text: str) -> Any:
    """`text` as a TOML value, or as the string it is when TOML has no such value."""
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
                f"override `{text}` reaches into `{key}`, which is a value and not a section",
                hint="recipes/ holds examples of every section",
            )
        else:
            result[key] = value
    return result


def with_absolute_paths(
    data: Mapping[str, Any], folder: Path, *, section: type[BaseModel] = Recipe
) -> dict[str, Any]:
    """`data` with the relative paths of all path fields taken from `folder`."""
    result = dict(data)
    for key, field in section.model_fields.items():
        value = result.get(key)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if isinstance(value, Mapping):
                result[key] = with_absolute_paths(value, folder, section=kind)
        elif (rows := _section_of_rows(kind)) is not None:
            if isinstance(value, list):
                result[key] = [
                    with_absolute_paths(row, folder, section=rows) if isinstance(row, Mapping) else row
                    for row in cast("list[Any]", value)
                ]
        elif kind is Path or Path in get_args(kind):
            if isinstance(value, str):
                result[key] = str(folder / value)
            elif isinstance(value, list):
                result[key] = [str(folder / item) if isinstance(item, str) else item for item in value]
    return result


def _section_of_rows(kind: Any) -> type[BaseModel] | None:
    """The section that each table of an array of tables is, for `tuple[Section, ...]`."""
    first = next(iter(get_args(kind)), None)
    return first if isinstance(first, type) and issubclass(first, BaseModel) else None


def _explained(error: ValidationError, label: str) -> InputError:
    problems = [_problem(dict(details)) for details in error.errors()]
    more = f"; ... ({len(problems) - 3} more)" if len(problems) > 3 else ""
    return InputError(
        f"{label}: {'; '.join(problems[:3])}{more}", hint="recipes/ holds examples of every section"
    )


def _problem(details: dict[str, Any]) -> str:
    location = [str(part) for part in details["loc"]]
    where = f"[{'.'.join(location[:-1])}] " if len(location) > 1 else ""
    key = location[-1] if location else ""
    match details["type"]:
        case "extra_forbidden":
            return f"{where}unknown key `{key}`{did_you_mean(key, _fields_at(location[:-1]))}"
        case "missing":
            return f"{where}key `{key}` is missing"
        case "value_error":
            place = f"[{'.'.join(location)}] " if location else ""
            return f"{place}{details['ctx']['error']}"
        case _:
            return (
                f"{where}`{key}`: {details['msg'][:1].lower()}{details['msg'][1:]}, got {details['input']!r}"
            )


def _fields_at(location: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for name in location:
        if name.isdecimal():
            continue  # the place in an array of tables
        kind = section.model_fields[name].annotation
        kind = _section_of_rows(kind) or kind
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        section = kind
    return list(section.model_fields)
