"""The loss on images that are not trained on, with noise and noise levels that never change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.model.network import Sdxl
from spectune.model.prediction import Prediction
from spectune.training.data.buckets import Size
from spectune.training.data.dataset import Pictures, Variation
from spectune.training.data.latents import encode_pictures
from spectune.training.data.scan import Scan
from spectune.training.denoiser import Denoiser
from spectune.training.objective.losses import mse, per_image
from spectune.training.objective.target import ask
from spectune.training.seeds import derived_generator

VALIDATION_SEED = 0  # not the run's: runs with other seeds are compared on the same noise


@dataclass(frozen=True)
class HeldOut:
    """Held-out images of one size as one tensor each; rows are images."""

    latents: Tensor  # (images, channels, h, w) float32
    captions: tuple[str, ...]
    time_ids: Tensor  # (images, 6) float32
    names: tuple[str, ...]  # of the files; they seed the noise


def encode_held_out(model: Sdxl, scan: Scan, sizes: tuple[Size, ...]) -> list[HeldOut]:
    """The images of a scan, cut from their middle, as the modes of their posteriors."""
    pictures = Pictures(scan.images, sizes, Variation(), seed=VALIDATION_SEED)
    latents = encode_pictures(model, pictures, seed=None)
    return [
        HeldOut(
            latents=torch.stack([latents[image, False] for image, _ in members]),
            captions=tuple(scan.images[image].caption for image, _ in members),
            time_ids=torch.tensor(
                [pictures.centered(image).time_ids for image, _ in members], dtype=torch.float32
            ),
            names=tuple(scan.images[image].path.name for image, _ in members),
        )
        for members in pictures.buckets().values()
    ]


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser, held_out: list[HeldOut], prediction: Prediction, *, times: int, batch: int
) -> float:
    """Mean squared error over all images at `times` noise levels each, without weighting.

    Each image has its own noise for each level, seeded by its file name.
    """
    denoiser.eval()
    costs: list[Tensor] = []
    for group in held_out:
        height, width = group.latents.shape[-2:]
        levels = prediction.even_times(times, pixels=height * width * denoiser.model.pixels_per_latent**2)
        rows = [(image, level) for image in range(len(group.names)) for level in range(times)]
        for start in range(0, len(rows), batch):
            chunk = rows[start : start + batch]
            costs.append(_costs(denoiser, group, prediction, levels, chunk))
    return float(torch.cat(costs).double().mean())


def _costs(
    denoiser: Denoiser, group: HeldOut, prediction: Prediction, levels: Tensor, rows: list[tuple[int, int]]
) -> Tensor:
    device = denoiser.model.device
    images = [image for image, _ in rows]
    noise = torch.stack([_noise(group, image, level) for image, level in rows])
    times = levels[[level for _, level in rows]]
    question = ask(prediction, group.latents[images].to(device), noise.to(device), times.to(device))
    captions = [group.captions[image] for image in images]
    answer = denoiser(question.noised, question.timestep, captions, group.time_ids[images].to(device))
    return per_image(mse(answer, question.target)).cpu()


def _noise(group: HeldOut, image: int, level: int) -> Tensor:
    generator = derived_generator(VALIDATION_SEED, "held out", group.names[image], level)
    return torch.randn(group.latents[image].shape, generator=generator)
