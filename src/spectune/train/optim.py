"""Optimisers by name, each with its checked options, and learning rate schedules as functions of the step."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from torch.optim import AdamW, Optimizer

from spectune.errors import SpectuneError, did_you_mean

Beta = Annotated[float, Field(ge=0, lt=1)]


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AdamWOptions(Options):
    """Loshchilov and Hutter 2019; defaults as in torch, but without decay: the deltas start at zero."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class ProdigyPlusOptions(Options):
    """Arguments of ProdigyPlusScheduleFree 2.0.1 with its defaults."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    beta3: Beta | None = None
    weight_decay: float = Field(default=0.0, ge=0)
    weight_decay_by_lr: bool = True
    d0: float = Field(default=1e-6, gt=0)
    d_coef: float = Field(default=1.0, gt=0)
    d_limiter: bool = True
    prodigy_steps: int = Field(default=0, ge=0)  # the step size is frozen from this step on; 0: never
    schedulefree_c: float = Field(default=0, ge=0)
    eps: float | None = Field(default=1e-8, gt=0)
    split_groups: bool = True
    split_groups_mean: bool = False
    factored: bool = True
    factored_fp32: bool = True
    use_bias_correction: bool = False
    use_stableadamw: bool = True
    use_schedulefree: bool = True
    use_speed: bool = False
    stochastic_rounding: bool = True
    use_cautious: bool = False
    use_grams: bool = False
    use_adopt: bool = False
    use_orthograd: bool = False
    use_focus: bool = False


Groups = Sequence[dict[str, Any]]  # as torch takes them: {"params": [...], "part": "unet"}


@dataclass(frozen=True)
class OptimizerKind:
    options: type[Options]
    build: Callable[[Groups, float, Mapping[str, Any]], Optimizer]
    learning_rate: float  # when the recipe names none
    fixed_learning_rate: float | None = None
    schedule_free: bool = False


def _adamw(groups: Groups, learning_rate: float, options: Mapping[str, Any]) -> Optimizer:
    # fused: one kernel for all tensors instead of a loop over hundreds of small ones.
    return AdamW(list(groups), lr=learning_rate, fused=True, **options)


def _prodigy_plus(groups: Groups, learning_rate: float, options: Mapping[str, Any]) -> Optimizer:
    try:
        from prodigyplus import ProdigyPlusScheduleFree
    except ImportError as error:
        raise SpectuneError(
            "the optimiser prodigy_plus_schedule_free is not installed",
            hint="pip install 'prodigy-plus-schedule-free>=2.0.1'",
        ) from error
    optimizer = ProdigyPlusScheduleFree(list(groups), lr=learning_rate, **options)
    optimizer.log = _say  # it prints, and stdout belongs to pipes
    return optimizer


def _say(message: str) -> None:
    print(message, file=sys.stderr)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(AdamWOptions, _adamw, learning_rate=3e-4),
    "prodigy_plus_schedule_free": OptimizerKind(
        ProdigyPlusOptions, _prodigy_plus, learning_rate=1.0, fixed_learning_rate=1.0, schedule_free=True
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
        key = str(details["loc"][0])
        if details["type"] == "extra_forbidden":
            raise ValueError(
                f"{name} has no option `{key}`{did_you_mean(key, list(kind.model_fields))}"
            ) from None
        raise ValueError(f"option `{key}` of {name}: {details['msg']}, got {details['input']!r}") from None


def build_optimizer(
    name: str, groups: Groups, *, learning_rate: float | None = None, options: Mapping[str, Any] | None = None
) -> Optimizer:
    """The optimiser called `name` over parameter groups, in training mode."""
    kind = OPTIMIZERS[name]
    checked = check_options(name, options or {}).model_dump()
    with redirect_stdout(sys.stderr):
        optimizer = kind.build(
            groups, kind.learning_rate if learning_rate is None else learning_rate, checked
        )
    set_mode(optimizer, training=True)
    return optimizer


def set_mode(optimizer: Optimizer, *, training: bool) -> None:
    """Switch a schedule-free optimiser between the weights it steps on and those it stands for."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


@contextmanager
def finished_weights(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, the parameters hold what should be saved, sampled and validated.

    A schedule-free optimiser's way back is not exact in floating point, so the training weights are
    put back from a copy: looking at a run does not change it.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    kept = [parameter.detach().clone() for parameter in parameters]
    set_mode(optimizer, training=False)
    try:
        yield
    finally:
        set_mode(optimizer, training=True)
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def groups_by_part(trained: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """A parameter group for each part, in the order of the tensors: Prodigy estimates d for each group."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        groups.setdefault(name.partition(".")[0], []).append(parameter)
    return [{"params": parameters, "part": part} for part, parameters in groups.items()]


def step_sizes(optimizer: Optimizer) -> dict[str, float]:
    """Prodigy's estimate d of the distance to the solution for each part; empty for other optimisers."""
    return {group["part"]: float(group["d"]) for group in optimizer.param_groups if "d" in group}


Schedule = Callable[[float], float]  # share of the run done, 0..1 -> factor of the learning rate

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def rate_factor(schedule: str, step: int, *, steps: int, warmup_steps: int) -> float:
    """Factor of the learning rate after `step` finished steps: linear warm-up, then the schedule."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return SCHEDULES[schedule]((step - warmup_steps) / max(steps - warmup_steps, 1))
