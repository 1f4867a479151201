"""Load an autoencoder from its own file or folder and put it into a model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn

from spectune.errors import InputError
from spectune.files.provenance import Padding
from spectune.model.network import Autoencoder, Sdxl, fill, new_vae, no_vae
from spectune.model.vae.convention import CONFIG, VaeConvention
from spectune.model.vae.vae_file import NOT_A_VAE, VaeFile, check_latents, open_vae
from spectune.sdxl.layout import VaeLayout


@dataclass(frozen=True)
class LoadedVae:
    """An autoencoder in memory, frozen and in eval mode. `layout` holds scale and shift."""

    module: Autoencoder
    layout: VaeLayout
    convention: VaeConvention
    label: str  # file or folder name, for messages


def load_vae(
    path: Path,
    convention: VaeConvention,
    *,
    unet_channels: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LoadedVae:
    """Load an autoencoder from a safetensors file, a diffusers folder or a complete checkpoint.

    The default dtype is float32 because SDXL's own VAE overflows in float16. The UNet takes latents with
    `unet_channels`. If they are four times the channels of z, the z of FLUX.2 is packed.

    Raises:
        InputError: The file is a pickle, lacks the encoder or decoder, or contains another autoencoder.
    """
    with open_vae(path) as file:
        layout = file.layout(convention, unet_channels)
        module = _new_module(file, layout)
        # an integer is the batch counter of a norm
        state = {
            key: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
            for key, tensor in file.state(layout).items()
        }
        is_deep = file.kind == "AutoencoderDC"
        hint = f"pass the diffusers folder of the VAE, with its {CONFIG}" if is_deep else NOT_A_VAE
        fill(
            module,
            state,
            label=path.name,
            architecture="Sana's AutoencoderDC or its config.json" if is_deep else "SDXL's VAE",
            hint=hint,
        )
    pad_convolutions(module, convention.padding)
    return LoadedVae(module, layout, convention, path.name)


def _new_module(file: VaeFile, layout: VaeLayout) -> Autoencoder:
    try:
        with init_empty_weights(include_buffers=False):
            return new_vae(layout)
    except (TypeError, ValueError, IndexError, ZeroDivisionError, AssertionError) as error:
        if file.kind != "AutoencoderDC":
            raise
        raise InputError(
            f"diffusers cannot build the AutoencoderDC of {file.label}: {error}",
            hint=f"check its {CONFIG}",
        ) from None


def with_vae(model: Sdxl, vae: LoadedVae) -> Sdxl:
    """Return the model with another autoencoder.

    Raises:
        InputError: Its latents do not fit the UNet or the name of its convention, or nothing declares their
            scale.
    """
    check_latents(vae.layout, vae.convention, model.layout.unet.in_channels, vae.label)
    return replace(model, vae=vae.module, layout=replace(model.layout, vae=vae.layout))


def with_convention(model: Sdxl, convention: VaeConvention) -> Sdxl:
    """Return the model with another convention of its own autoencoder. The weights are shared.

    Raises:
        InputError: The model has no autoencoder.
    """
    if model.vae is None or model.layout.vae is None:
        raise no_vae()
    # copy the modules, because the caller's must keep their padding, but not the weights
    shared = {id(tensor): tensor for tensor in model.vae.parameters()}
    module = copy.deepcopy(model.vae, shared)
    pad_convolutions(module, convention.padding)
    layout = replace(model.layout.vae, scale=convention.scale, shift=convention.shift)
    return with_vae(model, LoadedVae(module, layout, convention, "the checkpoint's VAE"))


def choose_vae(model: Sdxl, path: Path | None, convention: VaeConvention) -> Sdxl:
    """Return the model with the autoencoder at `path`, or with its own one if `path` is None."""
    if path is None:
        return with_convention(model, convention)
    dtype = torch.float32 if model.vae is None else model.vae.dtype
    channels = model.layout.unet.in_channels
    vae = load_vae(path, convention, unet_channels=channels, device=model.device, dtype=dtype)
    return with_vae(model, vae)


def pad_convolutions(vae: nn.Module, padding: Padding) -> None:
    """Set the padding mode of every convolution that pads, in place.

    Downsamplers are not changed: they pad with zeros on one side, outside of their convolution.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str) and any(module.padding):
            module.padding_mode = padding
