"""The loss on validation images, with fixed noise and fixed noise levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from spectune.model.network import Sdxl
from spectune.model.prediction import Prediction
from spectune.training.data.buckets import Buckets
from spectune.training.data.dataset import Pictures, Variation
from spectune.training.data.latents import encode_pictures
from spectune.training.data.scan import Scan
from spectune.training.denoiser import Denoiser
from spectune.training.objective.losses import mse, per_image
from spectune.training.objective.noising import noise_latents
from spectune.training.processes.sharing import shared
from spectune.training.seeds import derived_generator

VALIDATION_SEED = 0  # the same in all runs, so that their validation losses can be compared


@dataclass(frozen=True)
class ValidationImages:
    """Validation images of one size; rows are images."""

    latents: Tensor  # (images, channels, h, w) float32
    captions: tuple[str, ...]
    time_ids: Tensor  # (images, 6) float32
    names: tuple[str, ...]  # file names, which seed the noise


def encode_validation(
    model: Sdxl,
    scan: Scan,
    buckets: Buckets,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ValidationImages]:
    """Encode the images of a scan, cropped at the center. Latents are the modes of their posteriors."""
    pictures = Pictures(scan.images, [buckets], Variation(), seed=VALIDATION_SEED)
    latents = encode_pictures(model, pictures, seed=None, progress=progress)
    return [
        ValidationImages(
            latents=torch.stack([latents.tensors[image] for image, _ in members]),
            captions=tuple(scan.images[image].caption for image, _ in members),
            time_ids=torch.tensor(
                [pictures.placements[image].time_ids for image, _ in members], dtype=torch.float32
            ),
            names=tuple(scan.images[image].path.name for image, _ in members),
        )
        for members in pictures.buckets().values()
    ]


@torch.no_grad()
def validation_loss(
    denoiser: Denoiser,
    images: Sequence[ValidationImages],
    prediction: Prediction,
    *,
    times: int,
    batch: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Return the unweighted mean squared error over all images at `times` noise levels each.

    The noise of an image at a level is seeded by its file name. `progress` is called with the number of
    finished predictions and their total.
    """
    denoiser.eval()
    work: list[_Predictions] = []
    for group in images:
        height, width = group.latents.shape[-2:]
        levels = prediction.even_times(times, pixels=height * width * denoiser.model.pixels_per_latent**2)
        rows = [(image, level) for image in range(len(group.names)) for level in range(times)]
        work += [
            _Predictions(group, levels, rows[start : start + batch]) for start in range(0, len(rows), batch)
        ]
    costs: list[Tensor] = []
    done, total = 0, times * sum(len(group.names) for group in images)
    for one in shared(work, partial(_costs, denoiser, prediction)):
        costs.append(one)
        done += len(one)
        progress(done, total)
    return float(torch.cat(costs).double().mean())


@dataclass(frozen=True)
class _Predictions:
    """Pairs (image, noise level) of one size that are predicted at once."""

    images: ValidationImages
    levels: Tensor
    rows: list[tuple[int, int]]


def _costs(denoiser: Denoiser, prediction: Prediction, work: _Predictions) -> Tensor:
    """Return the cost of each prediction, (rows,) on the CPU."""
    device, group, levels, rows = denoiser.model.device, work.images, work.levels, work.rows
    images = [image for image, _ in rows]
    noise = torch.stack([_noise(group, image, level) for image, level in rows]).to(device)
    times = levels[[level for _, level in rows]].to(device)
    noised = noise_latents(prediction, group.latents[images].to(device), noise, times)
    captions = [group.captions[image] for image in images]
    predicted = denoiser(noised.latents, noised.timestep, captions, group.time_ids[images].to(device))
    return per_image(mse(predicted, noised.target)).cpu()


def _noise(group: ValidationImages, image: int, level: int) -> Tensor:
    # "held out" is hashed into the seed: another spelling would change every validation loss
    generator = derived_generator(VALIDATION_SEED, "held out", group.names[image], level)
    return torch.randn(group.latents[image].shape, generator=generator)
