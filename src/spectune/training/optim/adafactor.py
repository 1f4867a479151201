"""Adafactor with relative steps that follow a schedule."""

from __future__ import annotations

from typing import Any

from transformers.optimization import Adafactor


class PacedAdafactor(Adafactor):
    """Adafactor that multiplies its relative steps by the learning rate of their group.

    With relative steps, the class of transformers ignores the learning rate and therefore every schedule.
    """

    @staticmethod
    def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> float:
        rate = Adafactor._get_lr(param_group, param_state)
        return rate * param_group["lr"] if param_group["relative_step"] else rate
