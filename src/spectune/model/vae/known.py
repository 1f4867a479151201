"""Published autoencoders. This module loads no network library: recipes and options use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from spectune.files.provenance import Padding
from spectune.sdxl.layout import SDXL_VAE_SCALE, SDXL_VAE_SHIFT

VaeKind = Literal["AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC"]  # the classes of diffusers


@dataclass(frozen=True)
class KnownVae:
    """A published autoencoder, as docs/reference/vae.md lists it with the sources of the values."""

    channels: int  # of the latents, which the UNet takes
    pixels_per_latent: int  # edge length
    scale: float
    shift: float = 0.0
    padding: Padding = "zeros"
    kind: VaeKind = "AutoencoderKL"
    # 2 x 2 of z are one latent with 4 x channels, normalized by the statistics of the file
    is_packed: bool = False


# Weight files do not contain scale and shift.
KNOWN_VAES: Mapping[str, KnownVae] = {
    "sdxl": KnownVae(4, 8, SDXL_VAE_SCALE, SDXL_VAE_SHIFT),
    "eq-kblueleaf": KnownVae(4, 8, SDXL_VAE_SCALE, SDXL_VAE_SHIFT),  # its card uses SDXL's values
    "eq-anzhc": KnownVae(4, 8, 0.1406, -0.4743, "reflect"),  # its model card
    "eq-bluvoll": KnownVae(4, 8, 0.1280, 0.1726, "reflect"),  # bluvoll's launch scripts; no file is named
    "flux1": KnownVae(16, 8, 0.3611, 0.1159),  # diffusers' configuration and ComfyUI's latent format
    # bluvoll's trainer; FLUX.2 itself packs
    "flux2": KnownVae(32, 8, 0.6043, 0.0760, kind="AutoencoderKLFlux2"),
    # diffusers' AutoencoderKLFlux2 and its pipeline
    "flux2-packed": KnownVae(128, 16, 1.0, kind="AutoencoderKLFlux2", is_packed=True),
    "sana": KnownVae(32, 32, 0.41407, kind="AutoencoderDC"),  # the configuration of Sana's AutoencoderDC
}
