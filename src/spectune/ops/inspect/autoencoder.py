"""Describe the file or folder of an autoencoder, from its header."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spectune.checkpoints.diffusers_folder.config import read_config
from spectune.files.reader import MODEL_INDEX
from spectune.model.vae.convention import CONFIG, VaeConvention, resolve_convention
from spectune.model.vae.known import KNOWN_VAES, VaeKind
from spectune.model.vae.vae_file import open_vae
from spectune.sdxl.layout import SDXL, VAE_ROOT

_PREFIXES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "bn.")


@dataclass(frozen=True)
class VaeSummary:
    """An autoencoder without a UNet."""

    label: str
    kind: VaeKind
    keys: str  # sgm or diffusers
    channels: int  # of its latents
    pixels_per_latent: int
    quant_convs: bool
    packed_channels: int | None  # if it has the statistics of packed latents
    # that the file declares, or that of SDXL for 4 channels; None if it must be named
    convention: VaeConvention | None
    names: tuple[str, ...]  # of known autoencoders of this form


def is_vae_file(tensors: Iterable[str]) -> bool:
    """Return whether the names of the tensors in a file are those of an autoencoder alone."""
    names = [name.removeprefix(VAE_ROOT) for name in tensors]
    return bool(names) and all(name.startswith(_PREFIXES) for name in names)


def is_vae_folder(path: Path) -> bool:
    """Return whether a path is the diffusers folder of an autoencoder, not of a pipeline."""
    if not path.is_dir() or (path / MODEL_INDEX).is_file():
        return False
    return str(read_config(path / CONFIG).get("_class_name", "")).startswith("Autoencoder")


def describe_vae(path: Path) -> VaeSummary:
    """Return the kind and the sizes of an autoencoder. Raises InputError for a kind that cannot be loaded."""
    convention = resolve_convention(path)
    with open_vae(path) as file:
        layout = file.layout(convention, unet_channels=0)
        channels, edge, kind = layout.latent_channels, layout.pixels_per_latent, file.kind
        is_known = channels == SDXL.unet.in_channels or not convention.is_assumed
        return VaeSummary(
            label=file.label,
            kind=kind,
            keys="sgm" if file.is_sgm else "diffusers",
            channels=channels,
            pixels_per_latent=edge,
            quant_convs=layout.quant_convs,
            packed_channels=4 * channels if kind == "AutoencoderKLFlux2" else None,
            convention=convention if is_known else None,
            names=tuple(
                name
                for name, known in KNOWN_VAES.items()
                if (known.kind, known.pixels_per_latent) == (kind, edge * (2 if known.is_packed else 1))
                and known.channels == channels * (4 if known.is_packed else 1)
            ),
        )
