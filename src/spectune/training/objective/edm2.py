"""A learned weighting of noise levels (Karras et al. 2024, EDM2).

The cost of each image is divided by exp(u). u is a function of the timestep that learns the logarithm of the
expected cost. All noise levels then have about the same weight, however large their costs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from spectune.model.prediction import TRAIN_STEPS


class LearnedWeighting(nn.Module):
    """A module that maps costs to cost/exp(u) + w*u, where w is the importance of the noise level.

    u = weight . features / sqrt(number of features). The features are sqrt(2) cos(2 pi (f*t + phase)), where
    t is the timestep scaled to -1..1, and f ~ N(0, 1) and phase are random and fixed. `weight` and u start
    at 0.
    """

    frequency: Tensor  # (features,)
    phase: Tensor  # (features,)

    def __init__(self, features: int = 128, *, importance_gamma: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.importance_gamma = importance_gamma
        self.register_buffer("frequency", torch.randn(features, generator=generator))
        self.register_buffer("phase", torch.rand(features, generator=generator))
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, costs: Tensor, timestep: Tensor, snr: Tensor) -> Tensor:
        """Return the weighted costs of images, which may be negative.

        All tensors are (batch,). `timestep` is the timestep input of the UNet.
        """
        u = self.log_cost(timestep)
        return costs.float() / u.exp() + importance(snr.float(), self.importance_gamma) * u

    def log_cost(self, timestep: Tensor) -> Tensor:
        """Return u at timesteps 0..1000, shape (batch,)."""
        # float32: bf16 distinguishes only 507 of the 1000 timesteps
        level = timestep.float() / (TRAIN_STEPS / 2) - 1
        angle = 2 * math.pi * (level[:, None] * self.frequency + self.phase)  # (batch, features)
        return math.sqrt(2 / len(self.weight)) * (angle.cos() @ self.weight)


def importance(snr: Tensor, gamma: float) -> Tensor:
    """Return w = 10 (1 + 1/gamma) min(snr, gamma)/(snr + 1), at least 1.

    Medium noise levels have the largest weight: w peaks at 10 for snr = gamma. When u has converged,
    cost/exp(u) equals w on average.
    """
    return (10 * (1 + 1 / gamma) * snr.clamp(max=gamma) / (snr + 1)).clamp(min=1)


def weighting_optimizer(weighting: nn.Module, *, learning_rate: float = 2e-2) -> AdamW:
    """Return the optimizer of a LearnedWeighting. It has no weight decay, which would pull u to 0."""
    return AdamW(weighting.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)


@dataclass(frozen=True)
class WeightingTrainer:
    """A learned weighting with its own optimizer."""

    weighting: LearnedWeighting
    optimizer: AdamW

    def step(self, mean_of_processes: Callable[[Tensor], Tensor]) -> None:
        """Update the weighting with the gradients of the training loss, averaged over all processes."""
        for parameter in self.weighting.parameters():
            assert parameter.grad is not None
            parameter.grad = mean_of_processes(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the weighting and the optimizer state. Inverse: load_state_dict."""
        return {"weighting": dict(self.weighting.state_dict()), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore a saved weighting, its features and its optimizer state."""
        self.weighting.load_state_dict(saved["weighting"])
        self.optimizer.load_state_dict(saved["optimizer"])
