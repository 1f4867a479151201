"""What the network is asked in a training step, and what its answer costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.model.prediction import Prediction, make_prediction
from spectune.train.loss import Loss, per_image
from spectune.train.weighting import Weighting, WeightingOptions

# Each maker takes the flow shift, which only flow uses.
OBJECTIVES: dict[str, Callable[[float], Prediction]] = {
    "eps": lambda shift: make_prediction("eps"),
    "v": lambda shift: make_prediction("v"),
    "flow": lambda shift: make_prediction("flow", flow_shift=shift),
}


@dataclass(frozen=True)
class Question:
    """Noised latents with the answer that is wanted; all tensors float32, leading axis batch."""

    noised: Tensor
    timestep: Tensor  # as the UNet is fed, (batch,)
    target: Tensor
    times: Tensor  # as the prediction type counts them, (batch,)


def ask(prediction: Prediction, x0: Tensor, noise: Tensor, times: Tensor) -> Question:
    """The question about clean latents `x0` at given noise and times.

    float32: noise, x_t and target lose their small differences in 16 bits.
    """
    x0, noise = x0.float(), noise.float()
    return Question(
        noised=prediction.add_noise(x0, noise, times),
        timestep=prediction.timestep(times),
        target=prediction.target(x0, noise, times),
        times=times,
    )


def ask_at_random(prediction: Prediction, x0: Tensor, generator: torch.Generator) -> Question:
    """The question at random times with random noise; the same on every device."""
    times = prediction.sample_times(len(x0), generator)
    noise = torch.randn(x0.shape, generator=generator)
    return ask(prediction, x0, noise.to(x0.device), times.to(x0.device))


@dataclass(frozen=True)
class Cost:
    """In this order: cost of each element, mean of each image, weight of its noise level, mean of all."""

    loss: Loss
    weighting: Weighting
    options: WeightingOptions

    def __call__(self, prediction: Prediction, answer: Tensor, question: Question) -> Tensor:
        """The training loss, a scalar."""
        images = per_image(self.loss(answer.float(), question.target))
        return (images * self.weighting(prediction.snr(question.times), self.options)).mean()
