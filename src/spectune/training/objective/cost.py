"""What a prediction costs: loss, mask, image weight and noise level weight combined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from spectune.training.objective.losses import HuberThreshold, Loss, per_image
from spectune.training.objective.noising import NoisedBatch
from spectune.training.objective.weightings import Weighting, WeightingOptions

CONSTANT_THRESHOLD = HuberThreshold()


@dataclass(frozen=True)
class Cost:
    """In this order: cost of each element, mask, mean of each image, image weight, noise level weight.

    `learned` maps (costs, timesteps, snr), all (batch,), to the costs to train on: edm2.LearnedWeighting.
    """

    loss: Loss
    weighting: Weighting
    options: WeightingOptions
    threshold: HuberThreshold = CONSTANT_THRESHOLD
    learned: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __call__(
        self,
        predicted: Tensor,
        noised: NoisedBatch,
        *,
        image_weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the training loss, a scalar; arguments as in `images`."""
        return self.of_batch(noised, self.images(predicted, noised, image_weights=image_weights, mask=mask))

    def of_batch(self, noised: NoisedBatch, costs: Tensor) -> Tensor:
        """Return the training loss of image costs, a scalar; it may be negative with a learned weighting."""
        if self.learned is not None:
            costs = self.learned(costs, noised.timestep, noised.snr)
        return costs.mean()

    def images(
        self,
        predicted: Tensor,
        noised: NoisedBatch,
        *,
        image_weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the cost of each image, shape (batch,), before a learned weighting.

        `image_weights` is (batch,). `mask` is (batch, 1, h, w), float32 in 0..1: how much each latent counts.
        """
        threshold = self.threshold.at(noised.snr)
        costs = per_image(self.loss(predicted, noised.target, mask=mask, huber_c=threshold))
        if image_weights is not None:
            costs = costs * image_weights
        return costs * self.weighting(noised.snr, self.options)
