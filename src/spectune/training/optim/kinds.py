"""The optimisers that a recipe can name, and how each is made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import ValidationError
from torch.optim import AdamW, Optimizer

from spectune.errors import SpectuneError, did_you_mean
from spectune.training.optim.options import (
    AdafactorOptions,
    AdamW8bitOptions,
    AdamWOptions,
    AdamWScheduleFreeOptions,
    DAdaptAdamOptions,
    LionOptions,
    Options,
    ProdigyOptions,
    ProdigyPlusOptions,
)

Groups = Sequence[dict[str, Any]]  # as torch takes them: {"params": [...], "part": "unet"}


@dataclass(frozen=True)
class OptimizerKind:
    """An optimiser as the recipe knows it."""

    options: type[Options]
    build: Callable[[Groups, float, Mapping[str, Any]], Optimizer]
    learning_rate: float  # when the recipe names none
    distribution: str = "torch"  # whose version decides whether a saved state fits
    fixed_learning_rate: float | None = None
    schedule_free: bool = False
    rounds_stochastically: bool = False  # updates of bf16 parameters are not lost in their rounding


def _loaded(module: str, name: str, *, needs: str, install: str) -> Callable[..., Optimizer]:
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise SpectuneError(
            f"the optimiser needs {needs}, which is not installed", hint=f"pip install '{install}'"
        ) from error


def _adamw(groups: Groups, learning_rate: float, options: Mapping[str, Any]) -> Optimizer:
    # fused: one kernel for all tensors instead of a loop over hundreds of small ones.
    return AdamW(list(groups), lr=learning_rate, fused=True, **options)


def _adamw8bit(groups: Groups, learning_rate: float, options: Mapping[str, Any]) -> Optimizer:
    made = _loaded(
        "spectune.training.optim.eight_bit",
        "PlainStateAdamW8bit",
        needs="bitsandbytes",
        install="spectune[bnb]",
    )
    return made(list(groups), lr=learning_rate, **options)


def _adafactor(groups: Groups, learning_rate: float, options: Mapping[str, Any]) -> Optimizer:
    from spectune.training.optim.adafactor import PacedAdafactor  # transformers takes seconds to import

    # It refuses a rate beside relative steps; each group has one all the same.
    return PacedAdafactor(list(groups), lr=None if options["relative_step"] else learning_rate, **options)


def _lion(groups: Groups, learning_rate: float, options: Mapping[str, Any]) -> Optimizer:
    made = _loaded("lion_pytorch", "Lion", needs="lion-pytorch", install="lion-pytorch")
    return made(list(groups), lr=learning_rate, **options)


def _dadapt_adam(groups: Groups, learning_rate: float, options: Mapping[str, Any]) -> Optimizer:
    made = _loaded("dadaptation", "DAdaptAdam", needs="dadaptation", install="spectune[dadapt]")
    return made(list(groups), lr=learning_rate, **_with_any_growth(options))


def _prodigy(groups: Groups, learning_rate: float, options: Mapping[str, Any]) -> Optimizer:
    made = _loaded("prodigyopt", "Prodigy", needs="prodigyopt", install="prodigyopt")
    return made(list(groups), lr=learning_rate, **_with_any_growth(options))


def _with_any_growth(options: Mapping[str, Any]) -> dict[str, Any]:
    growth = options["growth_rate"]
    return {**options, "growth_rate": float("inf") if growth is None else growth}


def _adamw_schedule_free(groups: Groups, learning_rate: float, options: Mapping[str, Any]) -> Optimizer:
    made = _loaded("schedulefree", "AdamWScheduleFree", needs="schedulefree", install="schedulefree")
    return made(list(groups), lr=learning_rate, **options)


def _prodigy_plus(groups: Groups, learning_rate: float, options: Mapping[str, Any]) -> Optimizer:
    made = _loaded(
        "prodigyplus",
        "ProdigyPlusScheduleFree",
        needs="prodigy-plus-schedule-free",
        install="prodigy-plus-schedule-free>=2.0.1",
    )
    optimizer: Any = made(list(groups), lr=learning_rate, **options)
    optimizer.log = _say  # it prints, and stdout belongs to pipes
    return optimizer


def _say(message: str) -> None:
    print(message, file=sys.stderr)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(AdamWOptions, _adamw, learning_rate=3e-4),
    "adamw8bit": OptimizerKind(AdamW8bitOptions, _adamw8bit, learning_rate=3e-4, distribution="bitsandbytes"),
    "adafactor": OptimizerKind(AdafactorOptions, _adafactor, learning_rate=3e-4, distribution="transformers"),
    # Chen et al. 2023, section 5: a rate 3 to 10 times smaller than AdamW's
    "lion": OptimizerKind(LionOptions, _lion, learning_rate=5e-5, distribution="lion-pytorch"),
    "dadapt_adam": OptimizerKind(
        DAdaptAdamOptions,
        _dadapt_adam,
        learning_rate=1.0,
        distribution="dadaptation",
        fixed_learning_rate=1.0,
    ),
    "prodigy": OptimizerKind(
        ProdigyOptions, _prodigy, learning_rate=1.0, distribution="prodigyopt", fixed_learning_rate=1.0
    ),
    "adamw_schedule_free": OptimizerKind(
        AdamWScheduleFreeOptions,
        _adamw_schedule_free,
        learning_rate=3e-4,
        distribution="schedulefree",
        schedule_free=True,
    ),
    "prodigy_plus_schedule_free": OptimizerKind(
        ProdigyPlusOptions,
        _prodigy_plus,
        learning_rate=1.0,
        distribution="prodigy-plus-schedule-free",
        fixed_learning_rate=1.0,
        schedule_free=True,
        rounds_stochastically=True,
    ),
}


def check_options(name: str, options: Mapping[str, Any]) -> Options:
    """The options of the optimiser `name`, complete with defaults.

    Raises ValueError that names the first option that is unknown or does not fit.
    """
    kind = OPTIMIZERS[name].options
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        details = error.errors()[0]
        if not details["loc"]:  # options that contradict each other
            raise ValueError(f"{name}: {details.get('ctx', {}).get('error')}") from None
        key = str(details["loc"][0])
        if details["type"] == "extra_forbidden":
            raise ValueError(
                f"{name} has no option `{key}`{did_you_mean(key, list(kind.model_fields))}"
            ) from None
        raise ValueError(f"option `{key}` of {name}: {details['msg']}, got {details['input']!r}") from None


@dataclass(frozen=True)
class Traits:
    """What an optimiser with its options is, where an option can take back what its kind promises."""

    fixed_learning_rate: float | None  # the only one it works with; None: the recipe chooses
    schedule_free: bool
    rounds_stochastically: bool


def traits_of(name: str, options: Options) -> Traits:
    """The traits of the optimiser `name` with checked `options`."""
    kind = OPTIMIZERS[name]
    fixed = kind.fixed_learning_rate
    if isinstance(options, AdafactorOptions) and options.relative_step:
        fixed = 1.0
    plus = options if isinstance(options, ProdigyPlusOptions) else None
    return Traits(
        fixed_learning_rate=fixed,
        schedule_free=kind.schedule_free and (plus is None or plus.use_schedulefree),
        rounds_stochastically=kind.rounds_stochastically and (plus is None or plus.stochastic_rounding),
    )
