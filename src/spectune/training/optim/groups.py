"""Parameter groups, one for each part of the model, with their learning rates and step size estimates."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from spectune.errors import InputError
from spectune.training.optim.kinds import OPTIMIZERS, Groups, check_options, traits_of
from spectune.training.optim.modes import set_mode


def groups_by_part(trained: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Return one parameter group for each part, in the order of the tensors."""
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
    """Build the optimizer `name` for parameter groups, in training mode.

    Args:
        name: A key of OPTIMIZERS.
        groups: Parameter groups with their `part`.
        learning_rate: The learning rate of all groups; None means the default of the optimizer.
        part_learning_rates: Learning rates of single parts, which replace `learning_rate`.
        options: Options of the optimizer.

    Raises:
        ValueError: An option is invalid.
        InputError: The optimizer requires another learning rate, or a part has no group.
        SpectuneError: The package of the optimizer is not installed.
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
            f"{name} computes its own step size and needs a learning rate of {fixed:g}, got {wrong[0]:g}",
            hint=f"remove optimizer.learning_rate or set it to {fixed:g}",
        )
    with redirect_stdout(sys.stderr):  # some optimizers print, but stdout is for pipes
        optimizer = kind.build(rated, common, checked.model_dump())
    set_mode(optimizer, training=True)
    return optimizer


def _with_rates(groups: Groups, common: float, of_parts: Mapping[str, float]) -> list[dict[str, Any]]:
    parts = [group.get("part", "") for group in groups]
    for part in of_parts:
        if part not in parts:
            raise InputError(
                f"optimizer.part_learning_rates names {part}, but this part is not trained",
                hint=f"trained parts: {', '.join(parts)}",
            )
    return [{**group, "lr": of_parts.get(part, common)} for part, group in zip(parts, groups, strict=True)]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the current learning rate of each part."""
    return {group["part"]: float(group["lr"]) for group in optimizer.param_groups}


def step_sizes(optimizer: Optimizer) -> dict[str, Tensor | float]:
    """Return each part's estimate d of the distance to the solution; empty for optimizers without one.

    ProdigyPlus estimates d for each part separately, Prodigy and D-Adaptation for all parts together.
    """
    return {group["part"]: group["d"] for group in optimizer.param_groups if "d" in group}
