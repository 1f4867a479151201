"""The scale and shift of an autoencoder's latents, and the padding of its convolutions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spectune.checkpoints.diffusers_folder.config import config_number, read_config
from spectune.errors import InputError, did_you_mean
from spectune.files.provenance import Padding, Provenance
from spectune.files.reader import MODEL_INDEX, open_file
from spectune.model.vae.known import KNOWN_VAES
from spectune.sdxl.layout import SDXL, SDXL_VAE_SCALE, SDXL_VAE_SHIFT, VaeLayout

CONFIG = "config.json"


@dataclass(frozen=True)
class VaeConvention:
    """The scale and shift of latents, latents = (z - shift) * scale, and the padding of convolutions."""

    scale: float
    shift: float
    padding: Padding
    name: str | None = field(default=None, compare=False)  # of a known autoencoder
    is_assumed: bool = field(default=False, compare=False)  # nothing declares the scale: it is SDXL's


# Used where neither the recipe nor a file declares values. They are right for fine-tunes of SDXL's VAE only.
ASSUMED = VaeConvention(SDXL_VAE_SCALE, SDXL_VAE_SHIFT, "zeros", is_assumed=True)


def resolve_convention(
    path: Path | None,
    *,
    name: str | None = None,
    scale: float | None = None,
    shift: float | None = None,
    padding: Padding | None = None,
    default: VaeConvention = ASSUMED,
) -> VaeConvention:
    """Return the convention of the autoencoder at `path`, or of the checkpoint if `path` is None.

    A name sets all three values. Otherwise each value comes from the first source that has it: the arguments;
    the config.json or spectune metadata of the file; `default` (the values of the checkpoint).

    Raises:
        InputError: The name is unknown, or it is combined with one of the three values.
    """
    if name is not None:
        if (scale, shift, padding) != (None, None, None):
            raise InputError(
                f"the VAE name {name!r} already sets scale, shift and padding, but some of them are set too",
                hint="set either the name or these values",
            )
        return known_convention(name)
    arguments = Provenance(vae_scale=scale, vae_shift=shift, vae_padding=padding)
    declared = Provenance() if path is None else _declared_by(path)
    return merge_conventions(arguments, declared, default=default)


def known_convention(name: str) -> VaeConvention:
    """Return the convention of a known autoencoder; raise InputError for an unknown name."""
    if name not in KNOWN_VAES:
        raise InputError(
            f"unknown VAE {name!r}{did_you_mean(name, KNOWN_VAES)}",
            hint=f"choose one of {', '.join(KNOWN_VAES)}",
        )
    known = KNOWN_VAES[name]
    return VaeConvention(known.scale, known.shift, known.padding, name=name)


def merge_conventions(*declared: Provenance, default: VaeConvention = ASSUMED) -> VaeConvention:
    """Return scale, shift and padding, each from the first record of `declared` that has it."""

    def first(field: str, default: Any) -> Any:
        values = (getattr(record, field) for record in declared)
        return next((value for value in values if value is not None), default)

    return VaeConvention(
        scale=first("vae_scale", default.scale),
        shift=first("vae_shift", default.shift),
        padding=first("vae_padding", default.padding),
        is_assumed=default.is_assumed and all(record.vae_scale is None for record in declared),
    )


def own_convention(own: VaeLayout | None, unet_channels: int) -> VaeConvention:
    """Return the convention of a checkpoint's own autoencoder.

    It is assumed if the checkpoint has none for the latents of its UNet, or does not declare their scale.
    """
    if own is None or own.unet_channels != unet_channels:
        return ASSUMED
    values = VaeConvention(own.scale, own.shift, "zeros")
    return replace(values, is_assumed=values == ASSUMED and unet_channels != SDXL.unet.in_channels)


def declares_vae(provenance: Provenance) -> bool:
    """Return whether the provenance of a file describes its autoencoder."""
    values = (provenance.vae_scale, provenance.vae_shift, provenance.vae_padding, provenance.vae_name)
    return any(value is not None for value in values)


def declare_vae(origin: Provenance, convention: VaeConvention, path: Path | None) -> Provenance:
    """Return `origin` with the convention and file name of the autoencoder that a run trains with.

    `path` is None for the autoencoder of the checkpoint.
    """
    return replace(
        origin,
        vae_scale=convention.scale,
        vae_shift=convention.shift,
        vae_padding=convention.padding,
        vae_name=None if path is None else path.name,
    )


def vae_folder(path: Path) -> Path:
    """Return the folder of the autoencoder: `path`, or its subfolder vae/ if `path` is a pipeline."""
    return path / "vae" if (path / MODEL_INDEX).is_file() else path


def _declared_by(path: Path) -> Provenance:
    """Read scale and shift from the file of an autoencoder, and the padding if its metadata has one."""
    if path.is_dir():
        where = vae_folder(path) / CONFIG
        config = read_config(where)
        return Provenance(
            vae_scale=config_number(config, "scaling_factor", where),
            vae_shift=config_number(config, "shift_factor", where),
        )
    with open_file(path) as file:
        return file.provenance
