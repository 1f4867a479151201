"""How much the noise level of an image counts; each weighting maps SNRs (batch,) to weights.

SNRs go from 0 (pure noise) to infinity (clean latents); every weight is finite, its limit at both ends.
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
    """What weightings depend on beside the signal-to-noise ratio."""

    prediction: PredictionName
    min_snr_gamma: float = 5.0
    scale_v_like_noise: bool = False


Weighting = Callable[[Tensor, WeightingOptions], Tensor]


def noise_weights(weighting: Weighting, snr: Tensor, options: WeightingOptions) -> Tensor:
    """Weights (batch,) of noise levels: the weighting's, times like_noise where the options ask for that."""
    weights = weighting(snr, options)
    return weights * like_noise(snr) if options.scale_v_like_noise else weights


def like_noise(snr: Tensor) -> Tensor:
    """snr/(snr + 1), by which a v loss becomes the eps loss of the same network.

    With x_t = alpha x0 + sigma eps, eps = alpha v + sigma x_t: an error of v is alpha times as large in eps,
    and alpha^2 = snr/(snr + 1) (Salimans and Ho 2022; kohya's scale_v_pred_loss_like_noise_pred).
    """
    return 1 / (1 + 1 / snr)


def none(snr: Tensor, options: WeightingOptions) -> Tensor:
    """1 for every image."""
    return torch.ones_like(snr)


def min_snr(snr: Tensor, options: WeightingOptions) -> Tensor:
    """min(snr, gamma)/snr for eps, min(snr, gamma)/(snr + 1) for v (Hang et al. 2023, section 3.4)."""
    gamma = options.min_snr_gamma
    if options.prediction == "v":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def soft_min_snr(snr: Tensor, options: WeightingOptions) -> Tensor:
    """min_snr with snr*gamma/(snr + gamma) for min(snr, gamma) (Crowson et al. 2024)."""
    gamma = options.min_snr_gamma
    weights = gamma / (snr + gamma)
    return weights * like_noise(snr) if options.prediction == "v" else weights


def debiased(snr: Tensor, options: WeightingOptions) -> Tensor:
    """1/sqrt(snr) for eps, 1/(snr + 1) for v (Yu et al. 2023, "Debias the training of diffusion models").

    For eps the snr is taken to be within 1/1000..1000: above as in kohya-ss/sd-scripts, below because a
    schedule that ends in pure noise has no other bound. SDXL's own, 0.0047 to 1175, only meets the upper one.
    """
    if options.prediction == "v":
        return 1 / (snr + 1)
    return snr.clamp(min=1 / DEBIASED_SNR, max=DEBIASED_SNR).rsqrt()


# Weightings that `min_snr_gamma` is for.
GAMMA_WEIGHTINGS = ("min_snr", "soft_min_snr")
WEIGHTINGS: dict[str, Weighting] = {
    "none": none,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "debiased": debiased,
    "edm2": none,  # what it weighs is learned: train/edm2.py
}
