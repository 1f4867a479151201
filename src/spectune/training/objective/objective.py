"""The objective of one run: noise its batches, predict, and compute costs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spectune.model.inject import Injection
from spectune.model.network import Sdxl
from spectune.model.prediction import Prediction
from spectune.training.data.dataset import Batch
from spectune.training.data.latents import encode_drawn
from spectune.training.denoiser import Denoiser
from spectune.training.eps_to_flow.bridge import Bridge
from spectune.training.eps_to_flow.conversion import Conversion, Network, velocity_of
from spectune.training.objective.cost import Cost
from spectune.training.objective.noising import NoisedBatch, NoiseOptions, noise_at_random
from spectune.training.seeds import derived_generator


@dataclass(frozen=True)
class Objective:
    """The training objective of a run.

    The noise of a batch is a function of `seed` and of the position of the batch. `prediction` is that of the
    file: sampling and validation use it. `training_prediction` noises the batches; its timesteps may differ.
    """

    denoiser: Denoiser
    injection: Injection
    prediction: Prediction
    training_prediction: Prediction
    noise: NoiseOptions
    cost: Cost
    seed: int
    encoder: Sdxl  # encodes the pixels of batches without cached latents
    conversion: Conversion | None = None  # if the run converts an EPS base to flow
    bridge: Bridge | None = None  # if an EPS or v model is trained with the loss of flow

    def noised(self, batch: Batch) -> NoisedBatch:
        """Add noise to a batch. With a teacher, the target is the teacher's velocity."""
        model, latents = self.denoiser.model, batch.latents
        if latents is None:
            assert batch.pixels is not None
            latents = encode_drawn(self.encoder, batch.pixels, batch.views, seed=self.seed)
        noised = noise_at_random(
            self.training_prediction,
            latents,
            derived_generator(self.seed, "noise", batch.position),
            noise=self.noise,
            pixels_per_latent=model.pixels_per_latent,
        )
        if self.conversion is None or not self.conversion.has_teacher:
            return noised
        return self.with_teacher(noised, batch)

    def with_teacher(self, noised: NoisedBatch, batch: Batch) -> NoisedBatch:
        """Replace the target with the teacher's velocity where the teacher defines one."""
        assert self.conversion is not None
        return self.conversion.with_teacher(noised, batch, self.denoiser, self.injection)

    def predict(self, network: Network, noised: NoisedBatch, batch: Batch, *, step: int) -> Tensor:
        """Return the prediction after `step` finished steps, (batch, channels, h, w) float32."""
        if self.bridge is not None:
            return velocity_of(network, noised, batch, self.bridge.at(noised.times))
        if self.conversion is None:
            return network(noised.latents, noised.timestep, batch.captions, batch.time_ids)
        return self.conversion.predict(network, noised, batch, step=step)

    def image_costs(self, network: Network, batch: Batch, *, step: int) -> tuple[NoisedBatch, Tensor]:
        """Return the noised batch and the cost of each image, (batch,), without a learned weighting."""
        noised = self.noised(batch)
        predicted = self.predict(network, noised, batch, step=step)
        return noised, self.cost.images(predicted, noised, image_weights=batch.weights, mask=batch.masks)
