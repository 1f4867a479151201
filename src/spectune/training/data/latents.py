"""Encode images to latents, once for a cache or at each draw, with the same noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from spectune.errors import InputError
from spectune.files.weights_hash import WeightsHasher
from spectune.model.network import Autoencoder, Sdxl, no_vae
from spectune.model.vae.tiles import TILE_PX
from spectune.sdxl.layout import VaeLayout
from spectune.training.data.buckets import Size
from spectune.training.data.dataset import CacheKey, Pictures, View
from spectune.training.data.store import LatentStore
from spectune.training.processes.sharing import on_any_process, shared, writes_files
from spectune.training.seeds import derived_generator

# Pixels per call of the encoder, which needs 2.7 GB per million pixels in float32.
ENCODE_PIXELS = 1024 * 1024
ENCODE_BATCH = 8  # largest number of images per call


class LatentsNotFiniteError(InputError):
    """Latents contain infinity or NaN."""


@torch.no_grad()
def encode_pictures(
    model: Sdxl,
    pictures: Pictures,
    *,
    flips: Sequence[bool] = (False,),
    seed: int | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    store: LatentStore | None = None,
) -> dict[CacheKey, Tensor]:
    """Return the latents of the cached views of all images, (variants * channels, h, w) float32 on the CPU.

    Args:
        model: A model with an autoencoder.
        pictures: The images.
        flips: The orientations to encode.
        seed: The seed for a sample of each posterior, whose noise depends on the view only; None takes the
            mode.
        progress: Called with the number of encoded views and their total.
        store: A cache on disk. Only views that are missing there are encoded.

    Raises:
        InputError: Latents are not finite.
    """
    latents: dict[CacheKey, Tensor] = {}
    variants = range(pictures.variation.cached_variants)
    done, total = 0, len(pictures) * len(flips) * len(variants)
    for members in pictures.buckets().values():
        views = [
            pictures.cached_view(image, flipped=flipped, variant=variant)
            for image, _ in members
            for flipped in flips
            for variant in variants
        ]
        encoded: dict[View, Tensor] = {}
        for view, posterior in _posteriors(model, pictures, views, store):
            encoded[view] = _sample(posterior, view, seed)
            done += 1
            progress(done, total)
        for key, group in groupby(views, key=lambda view: (view.image, view.placement.flipped)):
            # pop: each variant must be in memory only once
            rows = [encoded.pop(view) for view in group]
            latents[key] = rows[0] if len(rows) == 1 else torch.cat(rows)
    return latents


@torch.no_grad()
def encode_drawn(model: Sdxl, pixels: Tensor, views: Sequence[View], *, seed: int) -> Tensor:
    """Return latents (batch, channels, h, w) of pixels (batch, 3, height, width) in -1..1, without a cache.

    A view gets the same noise as in `encode_pictures`.

    Raises:
        InputError: Latents are not finite.
    """
    posteriors = checked_latents(encode_posteriors(model, pixels), "a batch").to(pixels.device)
    return torch.stack([_sample(row, view, seed) for row, view in zip(posteriors, views, strict=True)])


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


def _sample(posterior: Tensor, view: View, seed: int | None) -> Tensor:
    """Return the latents of a view, (channels, h, w): the mode, or a sample whose noise the view seeds."""
    mean, deviation = posterior.chunk(2)
    if seed is None:
        return mean.clone()
    generator = derived_generator(seed, "latents", view.image, view.pixels_name, view.variant)
    # on the CPU: the noise must not depend on the device
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return mean + deviation * noise


def _posteriors(
    model: Sdxl, pictures: Pictures, views: Sequence[View], store: LatentStore | None
) -> Iterator[tuple[View, Tensor]]:
    """Yield the posterior (2 * channels, h, w) of each view, from the store or the encoder.

    All views must have the same size.
    """
    missing: list[View] = list(views)
    files: dict[int, Path] = {}
    if store is not None:
        missing = []
        shape = _posterior_shape(model, views[0].placement.target)
        for image, group in groupby(views, key=lambda view: view.image):
            members = list(group)
            files[image] = store.file_of(pictures.images[image].path)
            stored = store.load(files[image], [view.pixels_name for view in members], shape)
            yield from ((view, stored[view.pixels_name]) for view in members if view.pixels_name in stored)
            missing += [view for view in members if view.pixels_name not in stored]
    # a view that another host lacks is encoded again
    absent = set(missing)
    missing = [views[i] for i in on_any_process(i for i, view in enumerate(views) if view in absent)]
    count = images_per_call(views[0].placement.target)
    chunks = [missing[start : start + count] for start in range(0, len(missing), count)]
    for chunk, rows in zip(chunks, shared(chunks, partial(_encoded, model, pictures)), strict=True):
        if store is not None and writes_files():
            for image, group in groupby(chunk, key=lambda view: view.image):
                store.add(files[image], {view.pixels_name: rows[view] for view in group})
        yield from rows.items()


def _encoded(model: Sdxl, pictures: Pictures, views: Sequence[View]) -> dict[View, Tensor]:
    pixels = torch.stack([pictures.pixels(view) for view in views])
    posteriors = encode_posteriors(model, pixels).cpu()
    return {
        view: checked_latents(row, pictures.images[view.image].path.name).clone()
        for view, row in zip(views, posteriors, strict=True)
    }


def _posterior_shape(model: Sdxl, size: Size) -> tuple[int, int, int]:
    step, (_, layout) = model.pixels_per_latent, _vae_of(model)
    return 2 * layout.unet_channels, size.height // step, size.width // step
