"""Fit the first and last convolution of a UNet to another autoencoder, by least squares on pictures.

Both autoencoders encode the same pictures, to old latents x and new latents y. The noise n of the new latents
determines that of the old ones, Q n. The rows of Q are orthonormal and nearest to the linear map from y to x,
so a direction of the new latents carries the noise of the direction of the old ones that it resembles.

* conv_in is fitted so that its outputs for noised y are those of the old layer for noised x.
* conv_out is fitted from its input features in the network with the new conv_in to the new target.

Both fits are ridge regressions towards the weights that the layers had before, as in the warm start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectune.core.linalg import thin_svd
from spectune.files.pipeline import Progress, report_progress
from spectune.model.network import Sdxl, TextStates
from spectune.training.eps_to_flow.warm_start import OUTPUT_RIDGE, fitted_convolution
from spectune.training.objective.noising import NoisedBatch, noise_latents

_linalg: Any = torch.linalg
INPUT_RIDGE = 1e-4  # relative to the mean squared input
DRAWS = 4  # of noise and noise level for each picture


@dataclass(frozen=True)
class Sample:
    """A picture in both latent spaces, with its conditioning."""

    old: Tensor  # (old channels, h, w), scaled
    new: Tensor  # (new channels, h, w), scaled
    text: TextStates  # of its caption, a batch of one
    time_ids: Tensor  # (1, 6)


@dataclass(frozen=True)
class Fitted:
    """The new weights, and squared errors relative to the squared values that were fitted."""

    first: tuple[Tensor, Tensor]  # weight and bias of conv_in
    last: tuple[Tensor, Tensor]  # of conv_out
    first_error: float  # of the outputs of conv_in
    before_error: float  # of the prediction, with the weights from which the fit starts
    last_error: float  # of the prediction


@torch.no_grad()
def fit_convolutions(
    old_first: nn.Conv2d, model: Sdxl, samples: Sequence[Sample], *, progress: Progress | None = None
) -> Fitted:
    """Fit conv_in and conv_out of `model` in place, and return their weights.

    Args:
        old_first: The first convolution of the original UNet.
        model: The UNet with new convolutions, whose weights are the start of the fit.
        samples: The pictures.
        progress: Counts runs of the UNet.
    """
    first, last = model.unet.conv_in, model.unet.conv_out
    noise_map = nearest_noise_map([sample.old for sample in samples], [sample.new for sample in samples])
    counter = _Counter(progress, (DRAWS + 2) * len(samples))
    before = _prediction_error(model, samples, counter)
    pairs = [_in_both(old_first, model, sample, noise_map, seed) for seed, sample in _draws(samples)]
    _load(first, fitted_convolution(first, pairs, ridge=INPUT_RIDGE))
    first_error = _relative_error((first(maps[None])[0], output) for maps, output in pairs)
    features = _features_and_targets(model, samples, counter)
    _load(last, fitted_convolution(last, features, ridge=OUTPUT_RIDGE))
    after = _prediction_error(model, samples, counter)
    return Fitted(_pair(first), _pair(last), first_error, before, after)


def nearest_noise_map(old: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    """Return Q (old channels, new channels): the orthonormal matrix nearest to the regression of x on y.

    With fewer new channels than old ones, its columns are orthonormal.
    """
    x, y = _centered(old), _centered(new)  # (values, channels)
    gram = y.T @ y
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    linear = cast("Tensor", _linalg.solve(gram, y.T @ x))
    left, _, right = thin_svd(linear.T)
    return (left @ right).float()


def _centered(maps: Sequence[Tensor]) -> Tensor:
    rows = torch.cat([one.flatten(1).T.cpu().double() for one in maps])
    return rows - rows.mean(0)


def _draws(samples: Sequence[Sample]) -> Iterator[tuple[int, Sample]]:
    """Yield each picture DRAWS times with the seeds of its noise."""
    for number in range(DRAWS):
        yield from ((number * len(samples) + index, sample) for index, sample in enumerate(samples))


def _drawn(model: Sdxl, sample: Sample, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Return a noise level and the noise of the new latents, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    pixels = sample.new.shape[1] * sample.new.shape[2] * model.pixels_per_latent**2
    times = model.prediction.sample_times(1, generator, pixels=pixels)
    return times, torch.randn(sample.new.shape, generator=generator), generator


def _in_both(
    old_first: nn.Conv2d, model: Sdxl, sample: Sample, noise_map: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Return noised new latents, and the output of the old conv_in for the old latents with their noise."""
    times, noise, generator = _drawn(model, sample, seed)
    old_noise = torch.einsum("on,nhw->ohw", noise_map, noise)
    missing = torch.eye(len(noise_map)) - noise_map @ noise_map.T  # not 0 with fewer new channels
    rest = torch.randn(old_noise.shape, generator=generator)
    old_noise = old_noise + torch.einsum("op,phw->ohw", missing, rest)
    device, dtype = old_first.weight.device, old_first.weight.dtype
    add = model.prediction.add_noise
    old = add(sample.old[None].cpu(), old_noise[None], times).to(device, dtype)
    new = add(sample.new[None].cpu(), noise[None], times)
    return new[0].to(device, dtype), old_first(old)[0].float()


def _noised(model: Sdxl, sample: Sample, seed: int) -> NoisedBatch:
    times, noise, _ = _drawn(model, sample, seed)
    return noise_latents(model.prediction, sample.new[None].cpu(), noise[None], times)


def _predicted(model: Sdxl, sample: Sample, noised: NoisedBatch) -> Tensor:
    device, dtype = model.unet.conv_out.weight.device, model.unet.conv_out.weight.dtype
    text = replace(sample.text.to(device), context=sample.text.context.to(device, dtype))
    return model.denoise(
        noised.latents.to(device, dtype), noised.timestep.to(device), text, sample.time_ids.to(device)
    )


def _features_and_targets(
    model: Sdxl, samples: Sequence[Sample], counter: _Counter
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the inputs of conv_out and the target of the prediction."""
    features: list[Tensor] = []
    hook = model.unet.conv_out.register_forward_pre_hook(
        lambda module, args: features.append(args[0].detach())
    )
    try:
        for seed, sample in _draws(samples):
            features.clear()
            noised = _noised(model, sample, seed)
            _predicted(model, sample, noised)
            counter.count()
            yield features[0][0], noised.target[0]
    finally:
        hook.remove()


def _prediction_error(model: Sdxl, samples: Sequence[Sample], counter: _Counter) -> float:
    """Return the relative squared error of the prediction on the pictures themselves."""

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for seed, sample in enumerate(samples):  # one draw each
            noised = _noised(model, sample, seed)
            yield _predicted(model, sample, noised)[0], noised.target[0]
            counter.count()

    return _relative_error(pairs())


def _relative_error(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    """Return the squared error relative to the squared size of the values."""
    error = size = 0.0
    for found, expected in pairs:
        error += float((found.float() - expected.to(found.device).float()).square().sum())
        size += float(expected.float().square().sum())
    return error / size


def _pair(layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    return layer.weight.detach().float().cpu(), layer.bias.detach().float().cpu()


def _load(layer: nn.Conv2d, fitted: tuple[Tensor, Tensor]) -> None:
    assert layer.bias is not None
    layer.weight.copy_(fitted[0])
    layer.bias.copy_(fitted[1])


@dataclass
class _Counter:
    progress: Progress | None
    total: int
    done: int = 0

    def count(self) -> None:
        self.done += 1
        report_progress(self.progress, self.done, self.total, "fit")
