"""Options of the operations on adapters and their models: rebuild, export, slice, convert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from spectune.errors import InputError
from spectune.model.vae.known import KNOWN_VAES
from spectune.operation import OperationOptions, argument, option, record
from spectune.ops.options.values import (
    BASE_HELP,
    CARD_HELP,
    DEVICE_HELP,
    DRAWING_DEVICE_HELP,
    FORCE_HELP,
    KEYS_HELP,
    LAYERS_HELP,
    FactorDtype,
    Keys,
    ModelPath,
    ParsedSlice,
    WeightDtype,
    check_one_rank,
)
from spectune.training.recipe.sections.base import LARGEST_FACTOR, MOST_PX, MOST_RANK

MOST_LATENT_CHANNELS = 256


@record
class RebuildOptions(OperationOptions):
    """Write the full checkpoint that results from applying an adapter to a base."""

    base: ModelPath = argument(
        metavar="MODEL", old_flag="--base", help="The original checkpoint, or a residual."
    )
    adapter: Path = argument(help="A tuned adapter or a LoRA; or the principal if MODEL is its residual.")
    out: Path = option(
        flag="-o",
        help="The output: x.safetensors, x.safetensors.index.json (shards), or a diffusers folder.",
    )
    _: KW_ONLY
    strength: str | float | Mapping[str, float] = option(
        default=1.0, help="Strength of the adapter: 0.8, or by part: unet=0.8,te=0.5."
    )
    dtype: WeightDtype | None = option(
        default=None, help="Dtype of the changed tensors. Default: as in MODEL."
    )
    cast_all: bool = option(
        default=False, help="With `dtype`: cast all tensors of the UNet and the text encoders."
    )
    card: bool = option(default=False, help=CARD_HELP)
    force: bool = option(default=False, help=FORCE_HELP)

    @model_validator(mode="after")
    def _check_cast(self) -> Self:
        if self.cast_all and self.dtype is None:
            raise InputError("`cast_all` requires `dtype`", hint="set `dtype`, for example to float16")
        return self


@record
class ExportOptions(OperationOptions):
    """Write a plain LoRA, which all programs load, from a tuned adapter or from two checkpoints."""

    tuned: Path = argument(help="A tuned adapter, a LoRA, a trained principal, or a tuned checkpoint.")
    out: Path = option(flag="-o", help="The file to write.")
    _: KW_ONLY
    base: ModelPath | None = argument(
        default=None,
        metavar="MODEL",
        old_flag="--base",
        help="The model that TUNED was made from. Required if TUNED is a checkpoint: the LoRA is their "
        "difference.",
    )
    rank: int | None = option(
        default=None,
        ge=1,
        le=MOST_RANK,
        help="Cut to this rank. Default: the full rank of an adapter (twice the trained rank), 64 for a "
        "checkpoint.",
    )
    conv_rank: int | None = option(
        default=None, ge=1, le=MOST_RANK, help="A different rank for convolutions larger than 1x1."
    )
    energy: float | None = option(
        default=None,
        ge=0,
        le=1,
        help="Instead of a rank: the share of each layer's squared change to keep, such as 0.99.",
    )
    size: str | int | None = option(
        default=None, help="Instead of a rank: the size of the output file, such as 150MB."
    )
    form: Literal["lora", "principal", "tuned"] = option(
        default="lora",
        help="lora (for the original model), principal (replaces the principal of a residual), or tuned "
        "(deltas of the principal of MODEL: `train` continues from it with model.start).",
    )
    keys: Keys = option(default="kohya", help=KEYS_HELP)
    dtype: FactorDtype = option(default="float16", help="Dtype of the stored factors.")
    principal: Path | None = option(
        default=None,
        help="The original principal, if TUNED is that principal after training with another program. With "
        "`form` tuned: the principal to use, instead of computing it.",
    )
    layers: tuple[str, ...] | None = option(default=None, help=f"For a checkpoint only. {LAYERS_HELP}")
    device: str = option(default="auto", help=f"For a checkpoint only. {DEVICE_HELP}")
    card: bool = option(default=False, help=CARD_HELP)
    force: bool = option(default=False, help=FORCE_HELP)

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        check_one_rank(self.rank, self.conv_rank, self.energy, self.size, size_name="size")
        return self


@record
class SliceOptions(OperationOptions):
    """Combine layers of adapters, or parts of checkpoints, into one file."""

    slices: tuple[ParsedSlice, ...] = argument(
        metavar="FILE[:TRAIT[:WEIGHT]]...",
        help="Adapters, each with the layers to take: te, te1, te2, unet, content, style, a block (down.1), "
        'a pattern ("unet.*attn2*") or a name from `traits`. Or checkpoints, each with a part: unet, te, '
        "te1, te2 or vae.",
    )
    out: Path = option(flag="-o", help="The file to write.")
    _: KW_ONLY
    traits: Path | None = option(
        default=None,
        help="A JSON file of traits in the format of the B-LoRA slicer: for each name a whitelist and a "
        "blacklist.",
    )
    base: ModelPath | None = option(default=None, help=BASE_HELP)
    keys: Keys = option(default="kohya", help=KEYS_HELP)
    dtype: FactorDtype | None = option(default=None, help="Dtype of the factors. Default: as in the inputs.")
    overlap: bool = option(
        default=True,
        help="Sum a layer that several slices contain.",
        off=("--no-overlap", "Stop if several slices contain the same layer. The default sums them."),
    )
    force: bool = option(default=False, help=FORCE_HELP)


@record
class ConvertOptions(OperationOptions):
    """Convert a file to another spelling, dtype or form. A tensor is dropped only if it matches `drop`."""

    source: ModelPath = argument(help="An adapter in any spelling, or a checkpoint.")
    out: Path = option(
        flag="-o",
        help="The output; for a checkpoint x.safetensors, x.safetensors.index.json or a folder.",
    )
    _: KW_ONLY
    keys: Keys = option(default="kohya", help=KEYS_HELP)
    dtype: FactorDtype | None = option(default=None, help="Dtype of the factors. Default: as in the file.")
    even_alphas: bool = option(
        default=False, help="Multiply every scale into the factors, so that alpha = rank."
    )
    principal: Path | None = option(
        default=None,
        help="The original principal, if SOURCE is that principal after training with another program. The "
        "trained deltas are written.",
    )
    drop: tuple[str, ...] = option(default=(), help="A pattern of keys to drop, such as *.diff_b.")
    ema: bool = option(
        default=False,
        help="For a checkpoint: write the moving averages that it contains (`model_ema.*`) as its UNet.",
    )
    latent_channels: int | None = option(
        default=None,
        ge=1,
        le=MOST_LATENT_CHANNELS,
        help="For a checkpoint: move it to latents with this number of channels. conv_in and conv_out of the "
        "UNet are new, and the model must be trained before it draws.",
    )
    vae: Path | None = option(
        default=None,
        help="With `latent_channels`: the autoencoder to put into the checkpoint, a .safetensors file or a "
        "diffusers folder. Default: leave the autoencoder out if it does not fit.",
    )
    vae_name: str | None = option(
        default=None,
        help=f"With `vae`: the name of its scale and shift: {', '.join(KNOWN_VAES)}. Default: as the file "
        "declares.",
    )
    vae_scale: float | None = option(
        default=None,
        ge=1e-6,
        le=LARGEST_FACTOR,
        help="With `vae`: its scale, latents = (z - shift) * scale.",
    )
    vae_shift: float | None = option(
        default=None, ge=-LARGEST_FACTOR, le=LARGEST_FACTOR, help="With `vae`: its shift."
    )
    init: Literal["zeros", "copy", "fit"] | None = option(
        default=None,
        help="With `latent_channels`: the new weights. zeros (the first channels keep their weights), copy "
        "(the old channels repeat), fit (least squares on `pictures`). Default: fit with `pictures`, "
        "otherwise zeros.",
    )
    pictures: Path | None = option(
        default=None, help="With `init` fit: a folder of pictures with captions; up to 64 are used."
    )
    size: int = option(
        default=1024, ge=16, le=MOST_PX, help="With `init` fit: the side of the square pictures, in pixels."
    )
    device: str = option(default="auto", help=f"With `init` fit. {DRAWING_DEVICE_HELP}")
    base: ModelPath | None = option(default=None, help=BASE_HELP)
    force: bool = option(default=False, help=FORCE_HELP)

    @model_validator(mode="after")
    def _check_move(self) -> Self:
        if self.latent_channels is None:
            names = ("vae", "vae_name", "vae_scale", "vae_shift", "init", "pictures")
            passed = [name for name in names if getattr(self, name) is not None]
            if passed:
                raise InputError(f"`{passed[0]}` requires `latent_channels`")
        if self.vae is None and (self.vae_name, self.vae_scale, self.vae_shift) != (None, None, None):
            raise InputError("`vae_name`, `vae_scale` and `vae_shift` require `vae`")
        if self.init == "fit" and (self.pictures is None or self.vae is None):
            raise InputError(
                "`init` fit requires `pictures` and `vae`",
                hint="set `pictures` to a folder of pictures and `vae` to the new autoencoder",
            )
        if self.pictures is not None and self.init in ("zeros", "copy"):
            raise InputError(f"`init` {self.init} uses no `pictures`", hint="leave out one of the two")
        if self.pictures is not None and self.vae is None:
            raise InputError("`pictures` requires `vae`: both autoencoders encode them")
        return self
