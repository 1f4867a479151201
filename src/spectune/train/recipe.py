"""A training run as a file: typed, frozen, with units in the names; unknown keys are errors.

Relative paths in a recipe are relative to its folder, those in overrides to the working directory.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spectune.errors import InputError, did_you_mean
from spectune.train.loss import LOSSES
from spectune.train.objective import OBJECTIVES
from spectune.train.optim import OPTIMIZERS, SCHEDULES, check_options
from spectune.train.weighting import WEIGHTINGS

PartName = Literal["unet", "te1", "te2"]
ALL_PARTS: tuple[PartName, ...] = get_args(PartName)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _known(word: str, known: Mapping[str, Any]) -> str:
    if word not in known:
        raise ValueError(f"`{word}` is none of {', '.join(known)}{did_you_mean(word, known)}")
    return word


class ModelSection(Section):
    """What is trained: a base checkpoint and the frame of its principal spectrum."""

    base: Path  # the original checkpoint; for form = "residual" also the residual file
    principal: Path | None = None  # principal adapter made by `spectune split`
    rank: int | None = Field(default=None, ge=1)  # instead of `principal`: split the base on the fly
    form: Literal["delta", "residual"] = "delta"
    parts: tuple[PartName, ...] = ALL_PARTS

    @model_validator(mode="after")
    def _one_frame(self) -> Self:
        if (self.principal is None) == (self.rank is None):
            raise ValueError("give either `principal` (a file made by `spectune split`) or `rank`")
        if not self.parts:
            raise ValueError(f"`parts` is empty; name some of {', '.join(ALL_PARTS)}")
        return self


class BucketSection(Section):
    """Aspect buckets: sizes of about `resolution_px`^2 pixels with sides from min to max in steps."""

    enabled: bool = False
    min_px: int = Field(default=256, ge=8)
    max_px: int = Field(default=1024, ge=8)
    step_px: int = Field(default=64, ge=8)


class CaptionSection(Section):
    """How the first line of a caption file becomes a caption."""

    extensions: tuple[str, ...] = (".txt", ".caption")
    shuffle: bool = False  # order of the comma separated tags
    keep_tokens: int = Field(default=0, ge=0)  # leading tags that keep their place
    dropout_probability: float = Field(default=0.0, ge=0, le=1)  # caption -> ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for extension in self.extensions:
            if not extension.startswith(".") or extension == ".":
                raise ValueError(f"`extensions` begin with a dot, such as `.txt`; got `{extension}`")
        if self.keep_tokens and not self.shuffle:
            raise ValueError("`keep_tokens` does nothing without `shuffle`; turn that on or leave it out")
        return self


class DataSection(Section):
    folders: tuple[Path, ...] = Field(min_length=1)  # parents of `N_name` folders, N = repeats
    resolution_px: int = Field(default=1024, ge=16)
    bucket: BucketSection = BucketSection()
    caption: CaptionSection = CaptionSection()
    flip_probability: float = Field(default=0.0, ge=0, le=1)
    random_crop: bool = False
    cache_latents: bool | None = None  # None: where crops are fixed
    cache_text: bool | None = None  # None: where encoders are frozen and captions fixed
    validation_folder: Path | None = None  # held-out images, in `N_name` folders or directly
    workers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cache_latents and self.random_crop:
            raise ValueError(
                "`cache_latents` needs fixed crops; turn `random_crop` off or leave the cache to itself"
            )
        if self.cache_text and self.caption.shuffle:
            raise ValueError("`cache_text` needs fixed captions; turn `caption.shuffle` off")
        sides = self.bucket
        if sides.enabled and not sides.min_px <= self.resolution_px <= sides.max_px:
            raise ValueError(
                f"`resolution_px` {self.resolution_px} lies outside the sides of the buckets, "
                f"{sides.min_px}..{sides.max_px}"
            )
        if sides.enabled and sides.step_px > self.resolution_px:
            raise ValueError(
                f"`bucket.step_px` {sides.step_px} is larger than `resolution_px` {self.resolution_px}: "
                "no bucket fits"
            )
        return self


class ObjectiveSection(Section):
    """What the network learns to answer; `flow_shift` moves the times of flow towards noise."""

    kind: str | None = None  # None: what the base declares, else eps
    flow_shift: float | None = Field(default=None, gt=0)  # None: what a flow base declares, else 1

    @model_validator(mode="after")
    def _shift_is_for_flow(self) -> Self:
        if self.kind is not None:
            _known(self.kind, OBJECTIVES)
        if self.flow_shift is not None and self.kind not in (None, "flow"):
            raise ValueError(f'`flow_shift` belongs to kind = "flow", not to "{self.kind}"')
        return self


class LossSection(Section):
    kind: str = "mse"
    weighting: str = "none"
    min_snr_gamma: float | None = Field(default=None, gt=0)  # None: 5, as in the paper

    @model_validator(mode="after")
    def _known_names(self) -> Self:
        _known(self.kind, LOSSES)
        _known(self.weighting, WEIGHTINGS)
        if self.min_snr_gamma is not None and self.weighting != "min_snr":
            raise ValueError('`min_snr_gamma` does nothing without weighting = "min_snr"')
        return self


class OptimizerSection(Section):
    name: str = "adamw"
    learning_rate: float | None = Field(default=None, gt=0)  # None: the optimiser's own default
    schedule: str = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)  # 0: gradients are not clipped
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _allowed(self) -> Self:
        _known(self.name, OPTIMIZERS)
        _known(self.schedule, SCHEDULES)
        check_options(self.name, self.options)
        kind = OPTIMIZERS[self.name]
        if kind.schedule_free and (self.schedule != "constant" or self.warmup_steps):
            raise ValueError(f"{self.name} is schedule-free: leave `schedule` and `warmup_steps` out")
        if kind.fixed_learning_rate is not None and self.learning_rate not in (
            None,
            kind.fixed_learning_rate,
        ):
            raise ValueError(
                f"{self.name} finds its step size itself: leave `learning_rate` out "
                f"or set it to {kind.fixed_learning_rate:g}"
            )
        return self


class RunSection(Section):
    name: str = Field(pattern=r"^[\w.-]+$")  # stem of the files written
    output: Path  # folder
    steps: int | None = Field(default=None, ge=0)
    epochs: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)  # images per process and forward pass
    accumulation: int = Field(default=1, ge=1)  # forward passes per optimiser step
    precision: Literal["fp32", "bf16"] = "fp32"  # of the frozen model; the trained tensors are always float32
    gradient_checkpointing: bool = False
    seed: int = Field(default=1, ge=0)
    save_every_steps: int | None = Field(default=None, ge=1)
    keep_last: int = Field(default=3, ge=1)  # saves that stay on disk
    validate_every_steps: int | None = Field(default=None, ge=1)  # None: before and after only
    validation_times: int = Field(default=4, ge=1)  # noise levels per held-out image
    preview_every_steps: int | None = Field(default=None, ge=1)
    log_every_steps: int = Field(default=1, ge=1)
    tensorboard: bool = True
    resume: bool = True

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        return self

    @field_validator("name")
    @classmethod
    def _a_plain_name(cls, name: str) -> str:
        if name.startswith("."):
            raise ValueError("the name starts with a dot")
        return name


class Recipe(Section):
    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    run: RunSection

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.objective.kind == "flow" and self.loss.weighting != "none":
            raise ValueError(
                f'loss.weighting = "{self.loss.weighting}" weighs by signal-to-noise ratio, '
                "which flow does not use"
            )
        trained = [part for part in self.model.parts if part != "unet"]
        if self.data.cache_text and trained:
            raise ValueError(
                f"data.cache_text needs frozen text encoders, but model.parts trains {', '.join(trained)}"
            )
        return self

    @property
    def caches_latents(self) -> bool:
        return self.data.cache_latents if self.data.cache_latents is not None else not self.data.random_crop

    @property
    def caches_text(self) -> bool:
        if self.data.cache_text is not None:
            return self.data.cache_text
        return self.model.parts == ("unet",) and not self.data.caption.shuffle


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
        elif kind is Path or Path in get_args(kind):
            if isinstance(value, str):
                result[key] = str(folder / value)
            elif isinstance(value, list):
                result[key] = [str(folder / item) if isinstance(item, str) else item for item in value]
    return result


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
        kind = section.model_fields[name].annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        section = kind
    return list(section.model_fields)
