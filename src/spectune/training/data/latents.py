"""Latents of pictures: encoded once and kept, or encoded as they are drawn, with the same noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectune.errors import InputError
from spectune.files.weights_hash import WeightsHasher
from spectune.model.network import Sdxl
from spectune.training.data.buckets import Size
from spectune.training.data.dataset import CacheKey, Pictures
from spectune.training.data.store import LatentStore
from spectune.training.data.views import View
from spectune.training.seeds import derived_generator

# Pixels that are encoded at once: the float32 encoder takes 2.7 GB for each million of them.
ENCODE_PIXELS = 1024 * 1024
ENCODE_BATCH = 8  # pictures, at most


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
    """Latents of the cached views of all images, float32 on the CPU; of several variants one after the other,
    (variants * channels, h, w).

    A sample of the posterior with `seed`, its mode with None; the noise of a view does not depend on which
    others are encoded. With `store`, only what it lacks is encoded.
    Raises InputError when latents are not finite.
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
        found: dict[View, Tensor] = {}
        for view, posterior in _posteriors(model, pictures, views, store):
            found[view] = _drawn(posterior, view, seed)
            done += 1
            progress(done, total)
        for key, group in groupby(views, key=lambda view: (view.image, view.placement.flipped)):
            # taken out of `found`, so that variants are in memory once
            rows = [found.pop(view) for view in group]
            latents[key] = rows[0] if len(rows) == 1 else torch.cat(rows)
    return latents


@torch.no_grad()
def encode_drawn(model: Sdxl, pixels: Tensor, views: Sequence[View], *, seed: int) -> Tensor:
    """Latents (batch, channels, h, w) of pixels (batch, 3, height, width) in -1..1 that are not cached.

    Fixed views get the noise that encode_pictures gives them. Raises InputError when latents are not finite.
    """
    posteriors = checked_latents(encode_posteriors(model, pixels), "a batch").to(pixels.device)
    return torch.stack([_drawn(row, view, seed) for row, view in zip(posteriors, views, strict=True)])


def encode_posteriors(model: Sdxl, pixels: Tensor) -> Tensor:
    """Mean and standard deviation of scaled latents, (batch, 2 * channels, h, w) float32.

    `pixels` are (batch, 3, height, width) in -1..1.
    """
    if model.vae is None or model.layout.vae is None:
        raise InputError("the checkpoint has no VAE", hint="name the file of one")
    shift, scale = model.layout.vae.shift, model.layout.vae.scale
    encoded = model.vae.encode(pixels.to(model.vae.device, model.vae.dtype))
    posterior = cast("Any", encoded).latent_dist
    return torch.cat([(posterior.mean.float() - shift) * scale, posterior.std.float() * scale], dim=1)


def checked_latents(latents: Tensor, what: str) -> Tensor:
    """`latents`, if they are finite: a broken VAE must not be trained on."""
    if not bool(torch.isfinite(latents).all()):
        raise InputError(
            f"the VAE's latents of {what} are not finite",
            hint="SDXL's own VAE overflows in float16; use it in float32",
        )
    return latents


def vae_key(model: Sdxl) -> str:
    """A hash of all that latents owe to the autoencoder: its weights, scale, shift and padding."""
    if model.vae is None or model.layout.vae is None:
        raise InputError("the checkpoint has no VAE", hint="name the file of one")
    hasher = WeightsHasher()
    for name, tensor in model.vae.state_dict().items():
        hasher.add(name, tensor.cpu())
    paddings = [module.padding_mode for module in model.vae.modules() if isinstance(module, nn.Conv2d)]
    described = repr((hasher.hexdigest(), model.layout.vae.scale, model.layout.vae.shift, paddings))
    return hashlib.sha256(described.encode()).hexdigest()


def _drawn(posterior: Tensor, view: View, seed: int | None) -> Tensor:
    """Latents (channels, h, w) of a view: the mode, or a sample with the view's own noise."""
    mean, deviation = posterior.chunk(2)
    if seed is None:
        return mean.clone()
    generator = derived_generator(seed, "latents", view.image, view.pixels_name, view.variant)
    # on the CPU, so that a run does not depend on its device
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return mean + deviation * noise


def _posteriors(
    model: Sdxl, pictures: Pictures, views: Sequence[View], store: LatentStore | None
) -> Iterator[tuple[View, Tensor]]:
    """The posterior (2 * channels, h, w) of each view of pictures of one size, remembered or computed."""
    missing: list[View] = list(views)
    files: dict[int, Path] = {}
    if store is not None:
        missing = []
        shape = _posterior_shape(model, pictures.targets[views[0].image])
        for image, group in groupby(views, key=lambda view: view.image):
            own = list(group)
            files[image] = store.file_of(pictures.images[image].path)
            known = store.load(files[image], [view.pixels_name for view in own], shape)
            yield from ((view, known[view.pixels_name]) for view in own if view.pixels_name in known)
            missing += [view for view in own if view.pixels_name not in known]
    size = pictures.targets[views[0].image]
    count = min(ENCODE_BATCH, max(1, ENCODE_PIXELS // (size.width * size.height)))
    for start in range(0, len(missing), count):
        chunk = missing[start : start + count]
        rows = _encoded(model, pictures, chunk)
        if store is not None:
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
    step = model.pixels_per_latent
    assert model.layout.vae is not None  # or the line before has raised
    return 2 * model.layout.vae.latent_channels, size.height // step, size.width // step
