"""Weights of noise levels by name.

A weighting maps signal-to-noise ratios (batch,) to weights (batch,). The SNR is 0 for pure noise and infinite
for clean latents; a weight must be finite at both ends. To add a weighting, write the function and add a row
to `WEIGHTINGS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.files.provenance import PredictionName

DEBIASED_SNR = 1000.0


@dataclass(frozen=True)
class WeightingOptions:
    """The inputs of a weighting other than the signal-to-noise ratio."""

    prediction: PredictionName
    min_snr_gamma: float = 5.0
    scale_v_like_noise: bool = False


@dataclass(frozen=True)
class Weighting:
    """A weighting with the facts that the recipe and the documentation need."""

    weights: Callable[[Tensor, WeightingOptions], Tensor]
    help: str
    formula: str
    source: str
    uses_gamma: bool = False  # depends on `min_snr_gamma`

    def __call__(self, snr: Tensor, options: WeightingOptions) -> Tensor:
        """Return weights (batch,); with `scale_v_like_noise`, they are multiplied by `like_noise`."""
        weights = self.weights(snr, options)
        return weights * like_noise(snr) if options.scale_v_like_noise else weights


def like_noise(snr: Tensor) -> Tensor:
    """Return snr/(snr + 1), which turns a v loss into the eps loss of the same network.

    eps = alpha v + sigma x_t, so an error of v causes alpha times this error in eps, and
    alpha^2 = snr/(snr + 1) (Salimans and Ho 2022; kohya's scale_v_pred_loss_like_noise_pred).
    """
    return 1 / (1 + 1 / snr)


def none(snr: Tensor, options: WeightingOptions) -> Tensor:
    """Return 1 for every image."""
    return torch.ones_like(snr)


def min_snr(snr: Tensor, options: WeightingOptions) -> Tensor:
    """Return min(snr, gamma)/snr for eps, min(snr, gamma)/(snr + 1) for v."""
    gamma = options.min_snr_gamma
    if options.prediction == "v":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def soft_min_snr(snr: Tensor, options: WeightingOptions) -> Tensor:
    """Return min_snr with snr*gamma/(snr + gamma) instead of min(snr, gamma)."""
    gamma = options.min_snr_gamma
    weights = gamma / (snr + gamma)
    return weights * like_noise(snr) if options.prediction == "v" else weights


def debiased(snr: Tensor, options: WeightingOptions) -> Tensor:
    """Return 1/sqrt(snr) for eps, 1/(snr + 1) for v.

    For eps, the SNR is clamped to 1/1000..1000. The upper bound is that of kohya-ss/sd-scripts. The lower
    bound keeps weights finite where a schedule ends in pure noise. SDXL's schedule, 0.0047 to 1175, reaches
    only the upper bound.
    """
    if options.prediction == "v":
        return 1 / (snr + 1)
    return snr.clamp(min=1 / DEBIASED_SNR, max=DEBIASED_SNR).rsqrt()


WEIGHTINGS: dict[str, Weighting] = {
    "none": Weighting(
        none, help="all noise levels have the same weight", formula="1", source="Ho et al. 2020, eq. 14"
    ),
    "min_snr": Weighting(
        min_snr,
        help="low noise levels have less weight",
        formula="eps: min(snr, gamma)/snr; v: min(snr, gamma)/(snr + 1)",
        source="Hang et al. 2023, section 3.4",
        uses_gamma=True,
    ),
    "soft_min_snr": Weighting(
        soft_min_snr,
        help="min_snr as a smooth function of the SNR",
        formula="eps: gamma/(snr + gamma); v: times snr/(snr + 1)",
        source="Crowson et al. 2024",
        uses_gamma=True,
    ),
    "debiased": Weighting(
        debiased,
        help="high noise levels have more weight",
        formula="eps: 1/sqrt(snr), snr clamped to 1/1000..1000; v: 1/(snr + 1)",
        source='Yu et al. 2023, "Debias the training of diffusion models"',
    ),
    "edm2": Weighting(
        none,
        help="weights are learned during the run; see [loss.edm2]",
        formula="cost/exp(u) + w*u, u learned, w the importance of the noise level",
        source="Karras et al. 2024, EDM2",
    ),
}
GAMMA_WEIGHTINGS = tuple(name for name, weighting in WEIGHTINGS.items() if weighting.uses_gamma)
