"""What a run asks its network: batches as questions, and how they are answered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.model.prediction import Prediction
from spectune.training.data.dataset import Batch, Pictures
from spectune.training.data.latents import encode_drawn
from spectune.training.data.plan import BatchPlan, PlannedBatches
from spectune.training.denoiser import Denoiser
from spectune.training.eps_to_flow.conversion import Conversion, Network
from spectune.training.objective.target import NoiseOptions, Question, ask_at_random
from spectune.training.prepare import Prepared
from spectune.training.seeds import derived_generator


@dataclass(frozen=True)
class Questions:
    """Batches of pictures as questions about them, a function of the run's seed and the batch's position."""

    prepared: Prepared
    denoiser: Denoiser
    pictures: Pictures
    plan: BatchPlan
    prediction: Prediction
    noise: NoiseOptions
    seed: int
    conversion: Conversion | None = None  # of an EPS base to flow

    def of(self, batch: Batch) -> Question:
        """The question about a batch; with a teacher, its answer is the target."""
        model, latents = self.prepared.model, batch.latents
        if latents is None:
            assert batch.pixels is not None
            latents = encode_drawn(model, batch.pixels, batch.views, seed=self.seed)
        question = ask_at_random(
            self.prediction,
            latents,
            derived_generator(self.seed, "noise", batch.position),
            noise=self.noise,
            pixels_per_latent=model.pixels_per_latent,
        )
        if self.conversion is None or not self.conversion.teaches:
            return question
        return self.taught(question, batch)

    def taught(self, question: Question, batch: Batch) -> Question:
        """The question with the velocity of the model as it was for target, as far as that reaches."""
        assert self.conversion is not None
        injection = self.prepared.injection
        return self.conversion.taught(question, self.denoiser, injection, batch.captions, batch.time_ids)

    def answer(self, network: Network, question: Question, batch: Batch, *, step: int) -> Tensor:
        """What the network answers after `step` finished steps, (batch, channels, h, w) float32."""
        if self.conversion is None:
            return network(question.noised, question.timestep, batch.captions, batch.time_ids)
        return self.conversion.answer(network, question, batch.captions, batch.time_ids, step=step)

    def first(self, count: int, device: torch.device) -> Iterator[tuple[Batch, Question]]:
        """The batches that the training sees first, and what it asks about them."""
        for draws in PlannedBatches(self.plan, 0, count):
            batch = self.pictures.__getitems__(draws).to(device)
            yield batch, self.of(batch)
