"""Adafactor that steps on stacks (see stacks.py), with relative steps that follow a schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.optimization import Adafactor

from spectune.training.optim.stacks import StackedOptimizer


class PacedAdafactor(StackedOptimizer, Adafactor):
    """Adafactor that multiplies its relative steps by the learning rate of their group.

    With relative steps, the class of transformers ignores the learning rate and therefore every schedule.
    """

    unstacked_options = ("scale_parameter",)  # each tensor then has a step size of its own

    @staticmethod
    def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> float:
        rate = Adafactor._get_lr(param_group, param_state)
        return rate * param_group["lr"] if param_group["relative_step"] else rate

    @staticmethod
    def _get_options(param_group: dict[str, Any], param_shape: torch.Size) -> tuple[bool, bool]:
        return Adafactor._get_options(param_group, param_shape[1:])

    def _part(self, key: str, value: Any, index: int, count: int) -> Any:
        if key == "RMS" and isinstance(value, Tensor):
            return value.flatten()[index]
        return super()._part(key, value, index, count)

    @staticmethod
    def _rms(tensor: Tensor) -> Tensor:
        """Return the root mean square of each tensor of a stack, (N, 1, ...), or of its only one, ()."""
        if len(tensor) == 1:
            return Adafactor._rms(tensor)
        norms = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())), keepdim=True)
        return norms / tensor[0].numel() ** 0.5
