"""The cost of a prediction: the product of loss, mask, image weight and noise level weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from spectune.training.objective.losses import HuberThreshold, Loss, per_image
from spectune.training.objective.noising import NoisedBatch
from spectune.training.objective.weightings import Weighting, WeightingOptions

CONSTANT_THRESHOLD = HuberThreshold()


@dataclass(frozen=True)
class Cost:
    """The cost of predictions.

    The loss of each element is multiplied by the mask and averaged over each image, then multiplied by the
    weights of the image and of the noise level. `learned` (edm2.LearnedWeighting) maps these costs, timesteps
    and signal-to-noise ratios, all (batch,), to the costs to train on.

    With `contrastive_weight` w, the loss against the target of another image of the batch, times w, is
    subtracted before these weights (Stoica et al. 2025, arXiv 2506.05350): L(F, target) - w L(F, other
    target). The other image is the previous one; batches are shuffled. A batch of one image has
    no other one.
    """

    loss: Loss
    weighting: Weighting
    options: WeightingOptions
    threshold: HuberThreshold = CONSTANT_THRESHOLD
    learned: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    contrastive_weight: float = 0.0

    def of_batch(self, noised: NoisedBatch, costs: Tensor, *, share: float = 1.0) -> Tensor:
        """Return the training loss from image costs, a scalar; a learned weighting can make it negative.

        `share` is the size of the batch relative to a full one: images of small batches must not count more.
        """
        if self.learned is not None:
            costs = self.learned(costs, noised.timestep, noised.snr)
        return costs.mean() * share

    def images(
        self,
        predicted: Tensor,
        noised: NoisedBatch,
        *,
        image_weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the cost of each image, shape (batch,), without a learned weighting.

        `image_weights` is (batch,). `mask` is the weight of each latent, (batch, 1, h, w), float32 in 0..1.
        """
        loss = partial(self.loss, predicted, mask=mask, huber_c=self.threshold.at(noised.snr))
        costs = per_image(loss(noised.target))
        if self.contrastive_weight and len(costs) > 1:
            costs = costs - self.contrastive_weight * per_image(loss(noised.target.roll(1, 0)))
        if image_weights is not None:
            costs = costs * image_weights
        return costs * self.weighting(noised.snr, self.options)
