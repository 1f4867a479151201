"""Parameter groups, one for each part of the model: their learning rates and estimated step sizes."""

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
    """Return a parameter group for each part, in the order of the tensors."""
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
    """Return the optimizer `name` over parameter groups, in training mode.

    Args:
        name: A key of OPTIMIZERS.
        groups: Parameter groups with their `part`.
        learning_rate: The rate of all groups; None is the optimizer's default.
        part_learning_rates: Rates that replace it in single parts.
        options: Options of the optimizer.

    Raises:
        ValueError: An option does not fit.
        InputError: The optimizer does not work with a rate, or a part has no group.
        SpectuneError: Its package is not installed.
    """
    kind = OPTIMIZERS[name]
    checked = check_options(name, options or {})
    fixed = traits_of(name, checked).fixed_learning_rate
    default = kind.learning_rate if fixed is None else fixed
    common = default if learning_rate is None else learning_rate
    rated = _with_rates(groups, common, part_learning_rates or {})
    wrong = [group["lr"] for group in rated if fixed is not None and group["lr"] != fixed]
    if wrong:
        raise InputError(
            f"{name} finds its own step size, but has a learning rate of {wrong[0]:g}",
            hint=f"leave the learning rate out or set it to {fixed:g}",
        )
    with redirect_stdout(sys.stderr):  # some print, and stdout is for pipes
        optimizer = kind.build(rated, common, checked.model_dump())
    set_mode(optimizer, training=True)
    return optimizer


def _with_rates(groups: Groups, common: float, of_parts: Mapping[str, float]) -> list[dict[str, Any]]:
    parts = [group.get("part", "") for group in groups]
    for part in of_parts:
        if part not in parts:
            raise InputError(
                f"optimizer.part_learning_rates names {part}, but no tensor of it is trained",
                hint=f"trained parts: {', '.join(parts)}",
            )
    return [{**group, "lr": of_parts.get(part, common)} for part, group in zip(parts, groups, strict=True)]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the current learning rate of each part."""
    return {group["part"]: float(group["lr"]) for group in optimizer.param_groups}


def step_sizes(optimizer: Optimizer) -> dict[str, float]:
    """Return each part's estimate d of the distance to the solution; empty for optimizers without one.

    ProdigyPlus estimates d for each part separately, Prodigy and D-Adaptation for all parts together.
    """
    return {group["part"]: float(group["d"]) for group in optimizer.param_groups if "d" in group}
