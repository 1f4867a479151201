"""What the network is asked in a training step, and what its answer costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.model.prediction import UNIFORM, LogitNormal, Prediction, Shift, Uniform, make_prediction
from spectune.training.objective.losses import HuberTurn, Loss, per_image
from spectune.training.objective.weightings import Weighting, WeightingOptions, noise_weights

SDXL_PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class ObjectiveOptions:
    """What objectives depend on; each takes what it has a use for."""

    flow_shift: Shift = 1.0
    flow_levels: Uniform | LogitNormal = UNIFORM
    zero_terminal_snr: bool = False


OBJECTIVES: dict[str, Callable[[ObjectiveOptions], Prediction]] = {
    "eps": lambda it: make_prediction("eps", zero_terminal_snr=it.zero_terminal_snr),
    "v": lambda it: make_prediction("v", zero_terminal_snr=it.zero_terminal_snr),
    "flow": lambda it: make_prediction("flow", flow_shift=it.flow_shift, flow_levels=it.flow_levels),
}


@dataclass(frozen=True)
class NoiseOptions:
    """How training noise differs from white noise."""

    offset: float = 0.0  # standard deviation of what is added to the mean of each channel
    perturbation: float = 0.0  # standard deviation of more noise that only the network's input has


WHITE = NoiseOptions()
CONSTANT_TURN = HuberTurn()


@dataclass(frozen=True)
class Question:
    """Noised latents with the answer that is wanted; all tensors float32, leading axis batch."""

    noised: Tensor
    timestep: Tensor  # as the UNet is fed, (batch,)
    target: Tensor
    times: Tensor  # as the prediction type counts them, (batch,)


def ask(
    prediction: Prediction, x0: Tensor, noise: Tensor, times: Tensor, *, perturbation: Tensor | None = None
) -> Question:
    """The question about clean latents `x0` at given noise and times.

    `perturbation` is added to the noise in x_t and not in the target (Ning et al. 2023, alg. 1).
    float32: noise, x_t and target lose their small differences in 16 bits.
    """
    x0, noise = x0.float(), noise.float()
    seen = noise if perturbation is None else noise + perturbation.float()
    return Question(
        noised=prediction.add_noise(x0, seen, times),
        timestep=prediction.timestep(times),
        target=prediction.target(x0, noise, times),
        times=times,
    )


def ask_at_random(
    prediction: Prediction,
    x0: Tensor,
    generator: torch.Generator,
    *,
    noise: NoiseOptions = WHITE,
    pixels_per_latent: int = SDXL_PIXELS_PER_LATENT,
) -> Question:
    """The question at random times with random noise; the same on every device.

    `x0` is (batch, channels, h, w), `pixels_per_latent` the edge length of a latent. Noise with an offset is
    eps + offset*randn(batch, channels, 1, 1) (Guttenberg 2023, "Diffusion with offset noise").
    """
    batch, channels, height, width = x0.shape
    times = prediction.sample_times(batch, generator, pixels=height * width * pixels_per_latent**2)
    drawn = torch.randn(x0.shape, generator=generator)
    if noise.offset:
        drawn = drawn + noise.offset * torch.randn(batch, channels, 1, 1, generator=generator)
    perturbation = None
    if noise.perturbation:
        perturbation = (noise.perturbation * torch.randn(x0.shape, generator=generator)).to(x0.device)
    return ask(prediction, x0, drawn.to(x0.device), times.to(x0.device), perturbation=perturbation)


@dataclass(frozen=True)
class Cost:
    """In this order: cost of each element, mask, mean of each image, its weight, weight of its noise level.

    `learned` maps (costs, timesteps, snr), all (batch,), to the costs that train: edm2.LearnedWeighting.
    """

    loss: Loss
    weighting: Weighting
    options: WeightingOptions
    turn: HuberTurn = CONSTANT_TURN
    learned: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __call__(
        self,
        prediction: Prediction,
        answer: Tensor,
        question: Question,
        *,
        image_weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The training loss, a scalar; arguments as in `images`."""
        costs = self.images(prediction, answer, question, image_weights=image_weights, mask=mask)
        return self.of_batch(prediction, question, costs)

    def of_batch(self, prediction: Prediction, question: Question, costs: Tensor) -> Tensor:
        """What trains, a scalar, from the costs of images; with a learned weighting it may be negative."""
        if self.learned is not None:
            costs = self.learned(costs, question.timestep, prediction.snr(question.times))
        return costs.mean()

    def images(
        self,
        prediction: Prediction,
        answer: Tensor,
        question: Question,
        *,
        image_weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The weighted cost of each image, shape (batch,), before anything learned.

        `image_weights` is (batch,); `mask` is (batch, 1, h, w), float32 in 0..1, where the loss counts.
        """
        snr = prediction.snr(question.times)
        costs = per_image(self.loss(answer, question.target, mask=mask, turn=self.turn.at(snr)))
        if image_weights is not None:
            costs = costs * image_weights
        return costs * noise_weights(self.weighting, snr, self.options)
