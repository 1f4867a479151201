"""ProdigyPlusScheduleFree that steps on stacks; see stacks.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from prodigyplus import ProdigyPlusScheduleFree
from torch import Tensor

from spectune.training.optim.stacks import StackedOptimizer, State


class StackedProdigyPlus(StackedOptimizer, ProdigyPlusScheduleFree):
    """ProdigyPlusScheduleFree with its arguments, results and saved state, in far fewer kernel launches."""

    unstacked_options = ("use_speed", "use_cautious", "use_orthograd")
    vectors = ("s", "p0")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums_on_host = False

    def set_train_mode(self, train: bool) -> None:
        """Put the trained weights or their average into the tensors."""
        with self.stacked():
            super().set_train_mode(train)

    def get_sliced_tensor(self, tensor: Tensor, slice_p: int = 11) -> Tensor:
        """Return every `slice_p`-th value of each tensor of a stack, as one vector."""
        return tensor.flatten(1)[:, ::slice_p].reshape(-1)

    def update_prodigy(self, state: State, group: State, grad: Tensor, data: Tensor) -> None:
        """Add the terms of a stack to the sums that d is estimated from."""
        if group["use_speed"] or 0 < group["prodigy_steps"] <= group["k"]:
            super().update_prodigy(state, group, grad, data)
            return
        _, _, beta3 = self.get_betas(group)
        weight = group["d"] ** 2 / group["d0"] ** 0.5
        numerator, denominator = self.get_running_values_for_group(group)
        gradient = self.get_sliced_tensor(grad)
        s = state["s"].mul_(beta3).add_(gradient, alpha=weight)
        # The library rounds the sum of each tensor to the dtype of s, bf16.
        denominator.add_(s.abs().view(len(grad), -1).sum(dim=1).float().sum())
        numerator.add_(torch.dot(gradient, state["p0"] - self.get_sliced_tensor(data)), alpha=weight)

    def on_end_step(self) -> None:
        """Estimate d after the last stack of a step; the sums of all groups are read at once."""
        if self.parameters_to_process != 1:
            super().on_end_step()
            return
        owners = self.param_groups if self.param_groups[0]["split_groups"] else self.param_groups[:1]
        names = ("running_d_numerator", "running_d_denom")
        sums = torch.stack([group[name] for group in owners for name in names]).cpu()
        for index, group in enumerate(owners):
            group[names[0]], group[names[1]] = sums[2 * index], sums[2 * index + 1]
        self._sums_on_host = True
        try:
            super().on_end_step()
        finally:
            self._sums_on_host = False

    def get_running_values_for_group(self, group: State) -> tuple[Tensor, Tensor]:
        """Return numerator and denominator of d, on the device of the tensors except at the end of a step."""
        if not self._sums_on_host:
            return super().get_running_values_for_group(group)
        owner = group if group["split_groups"] else self.param_groups[0]
        return owner["running_d_numerator"], owner["running_d_denom"]

    def factored_dims(
        self, shape: Sequence[int], factored: bool, min_dim_size_to_factor: int
    ) -> tuple[int, int] | None:
        """Return the axes of a stack that are factored."""
        axes = super().factored_dims(shape[1:], factored, min_dim_size_to_factor)
        return None if axes is None else (axes[0] + 1, axes[1] + 1)

    def rms_clip_(self, tensor: Tensor) -> Tensor:
        """Scale each tensor of a stack down by the root of its root mean square, if that is above 1."""
        axes = tuple(range(1, tensor.dim()))
        norms = torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)
        return tensor.mul_(norms.div_(tensor[0].numel() ** 0.5).clamp_min_(1.0).rsqrt_())
