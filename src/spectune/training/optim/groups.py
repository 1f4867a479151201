"""Parameter groups, one for each part of the model: rates in, rates and estimated step sizes out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from torch import nn
from torch.optim import Optimizer

from spectune.errors import InputError
from spectune.training.optim.kinds import OPTIMIZERS, Groups, check_options, traits_of
from spectune.training.optim.modes import set_mode


def groups_by_part(trained: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """A parameter group for each part, in the order of the tensors."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        groups.setdefault(name.partition(".")[0], []).append(parameter)
    return [{"params": parameters, "part": part} for part, parameters in groups.items()]


def build_optimizer(
    name: str,
    groups: Groups,
    *,
    learning_rate: float | None = None,
    part_learning_rates: Mapping[str, float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """The optimiser called `name` over parameter groups, in training mode.

    `learning_rate` is that of all groups (None: the optimiser's own), `part_learning_rates` replace it for
    single parts. Raises ValueError for options that do not fit, InputError for a rate that the optimiser
    does not work with or a part without a group, SpectuneError when its package is not installed.
    """
    kind = OPTIMIZERS[name]
    checked = check_options(name, options or {})
    fixed = traits_of(name, checked).fixed_learning_rate
    own = kind.learning_rate if fixed is None else fixed
    common = own if learning_rate is None else learning_rate
    rated = _with_rates(groups, common, part_learning_rates or {})
    odd = [group["lr"] for group in rated if fixed is not None and group["lr"] != fixed]
    if odd:
        raise InputError(
            f"{name} finds its step size itself, but has a learning rate of {odd[0]:g}",
            hint=f"leave the learning rate out or set it to {fixed:g}",
        )
    with redirect_stdout(sys.stderr):  # some tell what they do, and stdout belongs to pipes
        optimizer = kind.build(rated, common, checked.model_dump())
    set_mode(optimizer, training=True)
    return optimizer


def _with_rates(groups: Groups, common: float, of_parts: Mapping[str, float]) -> list[dict[str, Any]]:
    parts = [group.get("part", "") for group in groups]
    for part in of_parts:
        if part not in parts:
            raise InputError(
                f"{part} has a learning rate of its own, but nothing of it is trained",
                hint=f"trained are {', '.join(parts)}: change optimizer.part_learning_rates",
            )
    return [{**group, "lr": of_parts.get(part, common)} for part, group in zip(parts, groups, strict=True)]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The learning rate of each part, as the schedule has set it."""
    return {group["part"]: float(group["lr"]) for group in optimizer.param_groups}


def step_sizes(optimizer: Optimizer) -> dict[str, float]:
    """The estimate d of the distance to the solution for each part; empty for optimisers without one.

    ProdigyPlus estimates it for each part by itself, Prodigy and D-Adaptation for all together.
    """
    return {group["part"]: float(group["d"]) for group in optimizer.param_groups if "d" in group}
