"""How autoencoders scale their latents and pad: the known ones by name, and who has the last word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectune.checkpoints.diffusers_folder.config import read_config
from spectune.errors import InputError, did_you_mean, some_of
from spectune.files.provenance import Padding, Provenance
from spectune.files.reader import MODEL_INDEX, PICKLES, open_file

__all__ = ["KNOWN_VAES", "Padding", "VaeConvention"]

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class VaeConvention:
    """How an autoencoder's latents are scaled, latents = (z - shift) * scale, and its convolutions padded."""

    scale: float
    shift: float
    padding: Padding


# Scale and shift are not in any weights file: they come from the model cards.
KNOWN_VAES: Mapping[str, VaeConvention] = {
    "sdxl": VaeConvention(0.13025, 0.0, "zeros"),
    # none published, its card's examples use SDXL's
    "eq-kblueleaf": VaeConvention(0.13025, 0.0, "zeros"),
    "eq-anzhc": VaeConvention(0.1406, -0.4743, "reflect"),
}


def resolve_vae(
    path: Path | None,
    name: str | None,
    scale: float | None,
    shift: float | None,
    padding: Padding | None,
    *,
    otherwise: VaeConvention = KNOWN_VAES["sdxl"],
) -> VaeConvention:
    """The convention of the autoencoder at `path`, or of the checkpoint's own where that is None.

    A name fixes all three. Else each comes from where it is said first: the arguments, the file's own
    config.json or spectune metadata, `otherwise` (what the checkpoint says).
    Raises InputError for an unknown name, and for a name together with one of the three.
    """
    if name is not None:
        if (scale, shift, padding) != (None, None, None):
            raise InputError(
                f"the VAE's name {name!r} fixes scale, shift and padding, and some of them are given too",
                hint="give one or the other",
            )
        return known_convention(name)
    told = Provenance() if path is None else _told_by(path)
    return merged_convention(
        Provenance(vae_scale=scale, vae_shift=shift, vae_padding=padding), told, otherwise=otherwise
    )


def known_convention(name: str) -> VaeConvention:
    """The convention of a known autoencoder; raises InputError for a name that is none."""
    if name not in KNOWN_VAES:
        raise InputError(
            f"unknown VAE {name!r}{did_you_mean(name, KNOWN_VAES)}", hint=f"one of {', '.join(KNOWN_VAES)}"
        )
    return KNOWN_VAES[name]


def merged_convention(*told: Provenance, otherwise: VaeConvention = KNOWN_VAES["sdxl"]) -> VaeConvention:
    """Scale, shift and padding, each as the first of `told` says that says it."""

    def first(key: str, default: Any) -> Any:
        found = (getattr(record, key) for record in told)
        return next((value for value in found if value is not None), default)

    return VaeConvention(
        scale=first("vae_scale", otherwise.scale),
        shift=first("vae_shift", otherwise.shift),
        padding=first("vae_padding", otherwise.padding),
    )


def says_vae(provenance: Provenance) -> bool:
    """Whether a file says anything of an autoencoder."""
    told = (provenance.vae_scale, provenance.vae_shift, provenance.vae_padding, provenance.vae_name)
    return any(value is not None for value in told)


def declare_vae(origin: Provenance, convention: VaeConvention, path: Path | None) -> Provenance:
    """`origin` with the autoencoder of a training; `path` is None for the checkpoint's own."""
    return replace(
        origin,
        vae_scale=convention.scale,
        vae_shift=convention.shift,
        vae_padding=convention.padding,
        vae_name=None if path is None else path.name,
    )


def vae_weights(path: Path) -> Path:
    """The safetensors file at `path`: itself, or the one in a folder of AutoencoderKL or of a pipeline.

    Raises InputError for a folder without one, or with several of which none is the full weights.
    """
    if not path.is_dir():
        return path
    folder = vae_folder(path)
    found = sorted(folder.glob("*.safetensors"))
    if folder / WEIGHTS in found:
        return folder / WEIGHTS
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{folder} holds {len(found)} weight files: {some_of([file.name for file in found])}",
            hint="pass one of them itself",
        )
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix.lower() in PICKLES)
    if pickles:
        raise InputError(
            f"{folder} has its weights as a pickle, which can run any program when it is opened; "
            f"it is never unpickled: {some_of(pickles)}",
            hint="look for the .safetensors form of the same model, or convert it in a sandbox",
        )
    raise InputError(
        f"{folder} has no weights: expected {WEIGHTS}", hint="pass the folder of the VAE, or its file"
    )


def vae_folder(path: Path) -> Path:
    """The folder of the autoencoder: `path`, or its vae/ where it is a whole pipeline."""
    return path / "vae" if (path / MODEL_INDEX).is_file() else path


def _told_by(path: Path) -> Provenance:
    """What an autoencoder's own file says of scale and shift; config.json knows no padding."""
    if path.is_dir():
        where = vae_folder(path) / CONFIG
        config = read_config(where)
        return Provenance(
            vae_scale=_number(config, "scaling_factor", where),
            vae_shift=_number(config, "shift_factor", where),
        )
    with open_file(path) as file:
        return file.provenance


def _number(config: Mapping[str, Any], key: str, where: Path) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{where}: {key} is {value!r}: expected a number")
    return float(value)
