"""How much the noise level of an image counts; each weighting maps SNRs (batch,) to weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.model.prediction import PredictionName


@dataclass(frozen=True)
class WeightingOptions:
    """What weightings depend on beside the signal-to-noise ratio."""

    prediction: PredictionName
    min_snr_gamma: float = 5.0


Weighting = Callable[[Tensor, WeightingOptions], Tensor]


def none(snr: Tensor, options: WeightingOptions) -> Tensor:
    """1 for every image."""
    return torch.ones_like(snr)


def min_snr(snr: Tensor, options: WeightingOptions) -> Tensor:
    """min(snr, gamma)/snr for eps, min(snr, gamma)/(snr + 1) for v (Hang et al. 2023, section 3.4)."""
    capped = snr.clamp(max=options.min_snr_gamma)
    return capped / (snr + 1) if options.prediction == "v" else capped / snr


WEIGHTINGS: dict[str, Weighting] = {"none": none, "min_snr": min_snr}
