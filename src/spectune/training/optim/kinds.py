"""The table of optimizers: their options, classes and traits."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from pydantic import ValidationError
from torch.optim import Optimizer

from spectune.errors import did_you_mean
from spectune.extras import extras_named
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
from spectune.training.optim.stacks import stacked_class

Groups = Sequence[dict[str, Any]]  # for torch: {"params": [...], "part": "unet"}
Arguments = dict[str, Any]  # of the class: `lr` and the options


def _unchanged(arguments: Arguments) -> Arguments:
    return arguments


def _fused(arguments: Arguments) -> Arguments:
    # one kernel for all tensors instead of a loop over hundreds of small ones
    return {**arguments, "fused": True}


def _own_rate(arguments: Arguments) -> Arguments:
    # Adafactor refuses a learning rate together with relative steps; each group has its rate anyway
    return {**arguments, "lr": None} if arguments["relative_step"] else arguments


def _any_growth(arguments: Arguments) -> Arguments:
    growth = arguments["growth_rate"]
    return {**arguments, "growth_rate": math.inf if growth is None else growth}


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that a recipe can name."""

    options: type[Options]
    class_path: str  # module:class, imported when the optimizer is built
    learning_rate: float  # if the recipe sets none
    distribution: str = "torch"  # the package; its version decides whether a saved state fits
    arguments: Callable[[Arguments], Arguments] = _unchanged
    fixed_learning_rate: float | None = None  # the only one that works; None: any
    schedule_free: bool = False
    rounds_stochastically: bool = False  # updates of bf16 parameters are not lost in rounding
    tensorwise: bool = False  # the step of a tensor depends on no other tensor; see tensorwise.py
    elementwise: bool = False  # the library's loop works on stacks of tensors as it is; see stacks.py

    def build(self, groups: Groups, learning_rate: float, options: Mapping[str, Any]) -> Optimizer:
        """Build the optimizer for parameter groups.

        Raises:
            InputError: The package of the optimizer is not installed.
        """
        module, _, name = self.class_path.partition(":")
        with extras_named("the optimizer"):
            optimizer_class: Any = getattr(import_module(module), name)
        if self.elementwise:
            optimizer_class = stacked_class(optimizer_class)
        optimizer = optimizer_class(list(groups), **self.arguments({"lr": learning_rate, **options}))
        if hasattr(optimizer, "log"):
            optimizer.log = _print_to_stderr  # ProdigyPlus prints with it, but stdout is for pipes
        return optimizer


def _print_to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


# The packages are by the authors of the methods, except for Lion. pytorch-optimizer 4.1.0 has four of them in
# one wheel but is no replacement: it has no ProdigyPlus, and its import takes 3 s instead of 0.02 s. After
# 200 steps its weights differ by up to 4e-4 for Lion (signs flip), 6e-5 for Prodigy (which stores a third
# more state and has no `slice_p`), 3e-6 for D-Adaptation, and 1.5e-3 for schedule-free AdamW (which adds
# 1e-15 under the root).
OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(
        AdamWOptions, "torch.optim:AdamW", learning_rate=3e-4, arguments=_fused, tensorwise=True
    ),
    "adamw8bit": OptimizerKind(
        AdamW8bitOptions,
        "spectune.training.optim.eight_bit:PlainStateAdamW8bit",
        learning_rate=3e-4,
        distribution="bitsandbytes",
        tensorwise=True,
    ),
    "adafactor": OptimizerKind(
        AdafactorOptions,
        "spectune.training.optim.adafactor:PacedAdafactor",
        learning_rate=3e-4,
        distribution="transformers",
        arguments=_own_rate,
        tensorwise=True,
    ),
    # Chen et al. 2023, section 5: a learning rate 3 to 10 times smaller than that of AdamW
    "lion": OptimizerKind(
        LionOptions,
        "lion_pytorch:Lion",
        learning_rate=5e-5,
        distribution="lion-pytorch",
        tensorwise=True,
        elementwise=True,
    ),
    "dadapt_adam": OptimizerKind(
        DAdaptAdamOptions,
        "dadaptation:DAdaptAdam",
        learning_rate=1.0,
        distribution="dadaptation",
        arguments=_any_growth,
        fixed_learning_rate=1.0,
        elementwise=True,
    ),
    "prodigy": OptimizerKind(
        ProdigyOptions,
        "spectune.training.optim.prodigy:StackedProdigy",
        learning_rate=1.0,
        distribution="prodigyopt",
        arguments=_any_growth,
        fixed_learning_rate=1.0,
    ),
    "adamw_schedule_free": OptimizerKind(
        AdamWScheduleFreeOptions,
        "schedulefree:AdamWScheduleFree",
        learning_rate=3e-4,
        distribution="schedulefree",
        schedule_free=True,
    ),
    "prodigy_plus_schedule_free": OptimizerKind(
        ProdigyPlusOptions,
        "spectune.training.optim.stacked_prodigy_plus:StackedProdigyPlus",
        learning_rate=1.0,
        distribution="prodigy-plus-schedule-free",
        fixed_learning_rate=1.0,
        schedule_free=True,
        rounds_stochastically=True,
    ),
}


def check_options(name: str, options: Mapping[str, Any]) -> Options:
    """Return the options of the optimizer `name`, with defaults filled in.

    Raises:
        ValueError: An option is unknown or invalid. The message names the first one.
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


def traits_of(name: str, options: Options) -> OptimizerKind:
    """Return the optimizer `name` without the traits that the checked `options` turn off."""
    kind = OPTIMIZERS[name]
    if isinstance(options, AdafactorOptions) and options.relative_step:
        return replace(kind, fixed_learning_rate=1.0)
    if isinstance(options, ProdigyPlusOptions):
        return replace(
            kind,
            schedule_free=options.use_schedulefree,
            rounds_stochastically=options.stochastic_rounding,
        )
    return kind
