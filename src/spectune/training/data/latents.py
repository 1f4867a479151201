"""Encode images to latents, once for a cache or at each draw, with the same noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from spectune.errors import InputError
from spectune.files.weights_hash import WeightsHasher
from spectune.model.network import Autoencoder, Sdxl, no_vae
from spectune.model.vae.tiles import TILE_PX
from spectune.sdxl.layout import VaeLayout
from spectune.training.data.buckets import Size
from spectune.training.data.dataset import Pictures, View
from spectune.training.processes.sharing import shared
from spectune.training.seeds import derived_generator

# Pixels per call of the encoder, which needs 2.7 GB per million pixels in float32.
ENCODE_PIXELS = 1024 * 1024
ENCODE_BATCH = 8  # largest number of images per call


class LatentsNotFiniteError(InputError):
    """Latents contain infinity or NaN."""


@dataclass(frozen=True)
class LatentsInMemory:
    """The latents of views by their numbers, (channels, h, w) float32 on the CPU."""

    tensors: Mapping[int, Tensor]
    in_memory = True

    def of(self, view: View, number: int) -> Tensor:
        """Return the latents of a view, (channels, h, w)."""
        return self.tensors[number]


@torch.no_grad()
def encode_pictures(
    model: Sdxl,
    pictures: Pictures,
    *,
    seed: int | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatentsInMemory:
    """Return the latents of the cached views of all images.

    Args:
        model: A model with an autoencoder.
        pictures: The images.
        seed: The seed for a sample of each posterior, whose noise depends on the view only; None takes the
            mode.
        progress: Called with the number of encoded views and their total.

    Raises:
        InputError: Latents are not finite.
    """
    latents: dict[int, Tensor] = {}
    per_image = pictures.views_per_image
    for size, members in pictures.buckets().items():
        numbers = [image * per_image + offset for image, _ in members for offset in range(per_image)]
        views = [pictures.view_numbered(number) for number in numbers]
        encoded = encode_views(model, pictures, views, size)
        for number, view, posterior in zip(numbers, views, encoded, strict=True):
            latents[number] = sample_posterior(posterior, view, seed)
            progress(len(latents), len(pictures) * per_image)
    return LatentsInMemory(latents)


def encode_views(
    model: Sdxl, pictures: Pictures, views: Sequence[View], size: Size, dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """Yield the posterior of each view on the CPU, (2 * channels, h, w), in the order of the views.

    The processes of a run divide the work. All must have the same views, which have one size.

    Raises:
        InputError: Latents are not finite.
    """
    count = images_per_call(size)
    chunks = [views[start : start + count] for start in range(0, len(views), count)]
    for rows in shared(chunks, partial(_encoded, model, pictures, dtype)):
        yield from rows


@torch.no_grad()
def encode_drawn(model: Sdxl, pixels: Tensor, views: Sequence[View], *, seed: int) -> Tensor:
    """Return latents (batch, channels, h, w) of pixels (batch, 3, height, width) in -1..1, without a cache.

    A view gets the same noise as in `encode_pictures`.

    Raises:
        InputError: Latents are not finite.
    """
    posteriors = checked_latents(encode_posteriors(model, pixels), "a batch").to(pixels.device)
    return torch.stack(
        [sample_posterior(row, view, seed) for row, view in zip(posteriors, views, strict=True)]
    )


def encode_posteriors(model: Sdxl, pixels: Tensor) -> Tensor:
    """Return the mean and the standard deviation of scaled latents, (batch, 2 * channels, h, w) float32.

    Args:
        model: A model with an autoencoder.
        pixels: (batch, 3, height, width) in -1..1.
    """
    _vae_of(model)  # with the hint of a recipe
    parts = pixels.split(images_per_call(Size(pixels.shape[-1], pixels.shape[-2])))
    encoded = [model.encode_posteriors(part) for part in parts]
    return encoded[0] if len(encoded) == 1 else torch.cat(encoded)


def images_per_call(size: Size) -> int:
    """Return the number of images of a size that are encoded at once."""
    return min(ENCODE_BATCH, max(1, ENCODE_PIXELS // (size.width * size.height)))


def _vae_of(model: Sdxl) -> tuple[Autoencoder, VaeLayout]:
    if model.vae is None or model.layout.vae is None:
        raise no_vae()
    return model.vae, model.layout.vae


def checked_latents(latents: Tensor, what: str) -> Tensor:
    """Return `latents`; raise LatentsNotFiniteError if they are not finite."""
    if not bool(torch.isfinite(latents).all()):
        raise LatentsNotFiniteError(
            f"the VAE's latents of {what} are not finite",
            hint='set vae.path to another VAE; with vae.encode = "bfloat16", set it to "float32" or "tiles"',
        )
    return latents


def vae_key(model: Sdxl) -> str:
    """Return a hash of the autoencoder's weights, dtype, scale, shift, padding and use of tiles."""
    vae, layout = _vae_of(model)
    hasher = WeightsHasher()
    for name, tensor in vae.state_dict().items():
        hasher.add(name, tensor.cpu())
    paddings = [module.padding_mode for module in vae.modules() if isinstance(module, nn.Conv2d)]
    described = repr((hasher.hexdigest(), layout.scale, layout.shift, paddings))
    if layout.packed is not None or layout.deep_config is not None:
        described += repr((layout.packed, layout.deep_config))
    if model.vae_tiles:
        described += f" in tiles of {TILE_PX} px"
    return hashlib.sha256(described.encode()).hexdigest()


def sample_posterior(posterior: Tensor, view: View, seed: int | None) -> Tensor:
    """Return the latents of a view, (channels, h, w): the mode, or a sample whose noise the view seeds.

    Args:
        posterior: Mean and standard deviation, (2 * channels, h, w) float32.
        view: The view.
        seed: The seed of the run; None takes the mode.
    """
    mean, deviation = posterior.chunk(2)
    if seed is None:
        return mean.clone()
    generator = derived_generator(seed, "latents", view.image, view.pixels_name, view.variant)
    # on the CPU: the noise must not depend on the device
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return mean + deviation * noise


def posterior_shape(model: Sdxl, size: Size) -> tuple[int, int, int]:
    """Return the shape of the posterior of an image of a size in pixels."""
    step, (_, layout) = model.pixels_per_latent, _vae_of(model)
    return 2 * layout.unet_channels, size.height // step, size.width // step


@torch.no_grad()
def _encoded(model: Sdxl, pictures: Pictures, dtype: torch.dtype, views: Sequence[View]) -> list[Tensor]:
    pixels = torch.stack([pictures.pixels(view) for view in views])
    posteriors = encode_posteriors(model, pixels).cpu()
    return [
        checked_latents(row, pictures.images[view.image].path.name).to(dtype).clone()
        for view, row in zip(views, posteriors, strict=True)
    ]
