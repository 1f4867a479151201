"""Encode pictures with the old and the new autoencoder, and fit the convolutions to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectune.errors import InputError
from spectune.files.source import WeightSource
from spectune.model.device import drawing_dtype, parse_device
from spectune.model.network import Sdxl, build_model
from spectune.model.vae.convention import VaeConvention
from spectune.model.vae.encoding import encoder_of, most_exact_way
from spectune.model.vae.loading import load_vae
from spectune.ops.latent_space.fit import Fitted, Sample, fit_convolutions
from spectune.ops.options.adapter_files import ConvertOptions
from spectune.training.data.buckets import Size, covering
from spectune.training.data.folders import scan_training
from spectune.training.data.images import open_image, render
from spectune.training.data.tables.images import CaptionedImage
from spectune.training.recipe.sections.data import DataSection

MOST_PICTURES = 64


def fit_to_pictures(
    source: WeightSource, start: Mapping[str, Tensor], options: ConvertOptions, convention: VaeConvention
) -> tuple[Fitted, int]:
    """Fit both convolutions, and return them with the number of pictures.

    `start` holds weight and bias of conv_in and conv_out, in this order.

    Raises:
        InputError: The checkpoint has no autoencoder or no text encoders, or no picture is usable.
    """
    assert options.vae is not None
    assert options.pictures is not None
    images = _chosen(options)
    device = parse_device(options.device)
    old = build_model(source, device=device, dtype=drawing_dtype(device))
    loaded = load_vae(options.vae, convention, unet_channels=options.latent_channels, device=device)
    channels = loaded.layout.unet_channels
    unet = replace(old.layout.unet, in_channels=channels, out_channels=channels)
    new = replace(old, vae=loaded.module, layout=replace(old.layout, unet=unet, vae=loaded.layout))
    if options.size % new.size_step:
        raise InputError(
            f"`size` is {options.size}: expected a multiple of {new.size_step}, which this model needs"
        )
    samples = [_sample(old, new, image, options.size) for image in images]
    old_first = old.unet.conv_in
    first_weight, first_bias, last_weight, last_bias = start.values()
    old.unet.conv_in = _convolution(old_first, first_weight, first_bias)
    old.unet.conv_out = _convolution(old.unet.conv_out, last_weight, last_bias)
    return fit_convolutions(old_first, new, samples, progress=options.progress), len(samples)


def _chosen(options: ConvertOptions) -> Sequence[CaptionedImage]:
    """Return at most MOST_PICTURES usable pictures, spread evenly over the folder."""
    images = scan_training(DataSection(folders=(Path(options.pictures or ""),))).images
    return images[:: -(-len(images) // MOST_PICTURES)]


@torch.no_grad()
def _sample(old: Sdxl, new: Sdxl, image: CaptionedImage, edge: int) -> Sample:
    """Encode a picture with both autoencoders.

    The old one gets it at the size at which its latents have as many rows and columns as the new ones.
    """
    placement = covering(image.size, Size(edge, edge))
    pixels = render(open_image(image.path), placement)[None]  # (1, 3, edge, edge)
    encoded = _encode(new, pixels)
    side = encoded.shape[-1] * old.pixels_per_latent
    if side != edge:
        pixels = F.interpolate(pixels, size=side, mode="bicubic", antialias=True).clamp(-1, 1)
    text = old.encode_captions([image.caption]).to("cpu")
    time_ids = torch.tensor([placement.time_ids], dtype=torch.float32)
    return Sample(_encode(old, pixels)[0], encoded[0], text, time_ids)


def _encode(model: Sdxl, pixels: Tensor) -> Tensor:
    area = pixels.shape[-1] * pixels.shape[-2]
    return encoder_of(model, most_exact_way(model, area)).encode_images(pixels).cpu()


def _convolution(old: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a convolution like `old` with other weights."""
    new = nn.Conv2d(weight.shape[1], weight.shape[0], old.kernel_size[0], padding=old.padding[0])
    new.load_state_dict({"weight": weight, "bias": bias})
    return new.requires_grad_(False).to(old.weight.device, old.weight.dtype)
