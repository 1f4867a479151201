"""A weighting of noise levels that is learned beside the model (Karras et al. 2024, EDM2).

Each image's cost is divided by exp(u), where u, a function of its timestep, is trained to follow the
logarithm of the cost to expect there. Levels then count alike, however large their costs are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from spectune.model.prediction import TRAIN_STEPS


class LearnedWeighting(nn.Module):
    """Costs to weighted costs: cost/exp(u) + w*u, w the importance of the noise level.

    u = weight . features / sqrt(number of features), features sqrt(2) cos(2 pi (f*t + phase)) of the timestep
    scaled to t in -1..1, with fixed random f ~ N(0, 1) and phases. `weight` begins at 0, and so does u.
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
        """Weighted costs of images; all (batch,), `timestep` as the UNet is fed. May be negative."""
        u = self.log_cost(timestep)
        return costs.float() / u.exp() + importance(snr.float(), self.importance_gamma) * u

    def log_cost(self, timestep: Tensor) -> Tensor:
        """u at timesteps 0..1000, shape (batch,)."""
        # float32: a bf16 timestep has 507 values of 1000
        level = timestep.float() / (TRAIN_STEPS / 2) - 1
        angle = 2 * math.pi * (level[:, None] * self.frequency + self.phase)  # (batch, features)
        return math.sqrt(2 / len(self.weight)) * (angle.cos() @ self.weight)


def importance(snr: Tensor, gamma: float) -> Tensor:
    """w = 10 (1 + 1/gamma) min(snr, gamma)/(snr + 1), at least 1: the middle of the noise levels counts most.

    At its peak, snr = gamma, w is 10; where training settles, cost/exp(u) is w.
    """
    return (10 * (1 + 1 / gamma) * snr.clamp(max=gamma) / (snr + 1)).clamp(min=1)


def weighting_optimizer(weighting: nn.Module, *, learning_rate: float = 2e-2) -> AdamW:
    """The optimiser of a LearnedWeighting; without weight decay, which would pull u to 0."""
    return AdamW(weighting.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
