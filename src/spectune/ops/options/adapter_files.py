"""OperationOptions of the operations on adapters and on their models: rebuild, export, slice, convert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from spectune.errors import InputError
from spectune.operation import OperationOptions, argument, option, record
from spectune.ops.options.values import (
    BASE_HELP,
    DEVICE_HELP,
    FORCE_HELP,
    KEYS_HELP,
    LAYERS_HELP,
    FactorDtype,
    Keys,
    ParsedSlice,
    WeightDtype,
    check_one_rank,
)


@record
class RebuildOptions(OperationOptions):
    """Write the full checkpoint that an adapter makes of a base."""

    base: Path = argument(
        metavar="MODEL", old_flag="--base", help="The original checkpoint, or the residual."
    )
    adapter: Path = argument(help="A tuned adapter or a LoRA; a principal where MODEL is its residual.")
    out: Path = option(
        flag="-o",
        help="What to write: x.safetensors, x.safetensors.index.json (shards), or a diffusers folder.",
    )
    _: KW_ONLY
    strength: str | float | Mapping[str, float] = option(
        default=1.0, help="Strength of the adapter: 0.8, or by part: unet=0.8,te=0.5."
    )
    dtype: WeightDtype | None = option(default=None, help="Dtype of changed tensors. Default: as in MODEL.")
    cast_all: bool = option(
        default=False, help="With `dtype`: cast all tensors of the UNet and the text encoders."
    )
    force: bool = option(default=False, help=FORCE_HELP)

    @model_validator(mode="after")
    def _check_cast(self) -> Self:
        if self.cast_all and self.dtype is None:
            raise InputError("`cast_all` requires `dtype`", hint="for example float16")
        return self


@record
class ExportOptions(OperationOptions):
    """Write a plain LoRA that loads everywhere: of a tuned adapter, or of two checkpoints."""

    tuned: Path = argument(
        help="A tuned adapter, a LoRA, a principal that was trained, or a tuned checkpoint."
    )
    out: Path = option(flag="-o", help="The file to write.")
    _: KW_ONLY
    base: Path | None = argument(
        default=None,
        metavar="MODEL",
        old_flag="--base",
        help="The model that TUNED was made from. Required for a checkpoint: its LoRA is the difference.",
    )
    rank: int | None = option(
        default=None,
        ge=1,
        help="Cut to this rank. Default: all of an adapter (twice the trained rank), 64 for a checkpoint.",
    )
    conv_rank: int | None = option(default=None, ge=1, help="Another rank for convolutions larger than 1x1.")
    energy: float | None = option(
        default=None, help="Instead of a rank: the share of each layer's change to keep, such as 0.99."
    )
    size: str | int | None = option(
        default=None, help="Instead of a rank: the size of the file, such as 150MB."
    )
    form: Literal["lora", "principal"] = option(
        default="lora",
        help="lora (for the original model) or principal (replaces the principal of a residual).",
    )
    keys: Keys = option(default="kohya", help=KEYS_HELP)
    dtype: FactorDtype = option(default="float16", help="Dtype of the stored factors.")
    principal: Path | None = option(
        default=None,
        help="The untouched principal, where TUNED is that principal after another program trained it.",
    )
    layers: tuple[str, ...] | None = option(default=None, help=f"For a checkpoint only. {LAYERS_HELP}")
    device: str = option(default="auto", help=f"For a checkpoint only. {DEVICE_HELP}")
    force: bool = option(default=False, help=FORCE_HELP)

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        check_one_rank(self.rank, self.conv_rank, self.energy, self.size, size_name="size")
        return self


@record
class SliceOptions(OperationOptions):
    """Combine parts of adapters, or of checkpoints: early-stopped encoders, swaps, traits."""

    slices: tuple[ParsedSlice, ...] = argument(
        metavar="FILE[:TRAIT[:WEIGHT]]...",
        help="Adapters with the layers to take: te, te1, te2, unet, content, style, a block (down.1), "
        "a pattern ('unet.*attn2*') or a name from `traits`. Checkpoints with a part each: unet, te, vae.",
    )
    out: Path = option(flag="-o", help="The file to write.")
    _: KW_ONLY
    traits: Path | None = option(
        default=None,
        help="A JSON file of traits, as for the B-LoRA slicer: a whitelist and a blacklist by name.",
    )
    base: Path | None = option(default=None, help=BASE_HELP)
    keys: Keys = option(default="kohya", help=KEYS_HELP)
    dtype: FactorDtype | None = option(default=None, help="Dtype of the factors. Default: as in the files.")
    overlap: bool = option(
        default=True,
        help="Sum layers that are in several slices.",
        off=("--no-overlap", "Refuse layers that are in several slices; the default sums them."),
    )
    force: bool = option(default=False, help=FORCE_HELP)


@record
class ConvertOptions(OperationOptions):
    """Write a file in another spelling, dtype or form. No tensor is dropped unless `drop` names it."""

    source: Path = argument(help="An adapter in any spelling, or a checkpoint.")
    out: Path = option(
        flag="-o",
        help="What to write; for a checkpoint x.safetensors, x.safetensors.index.json or a folder.",
    )
    _: KW_ONLY
    keys: Keys = option(default="kohya", help=KEYS_HELP)
    dtype: FactorDtype | None = option(default=None, help="Dtype of the factors. Default: as in the file.")
    even_alphas: bool = option(
        default=False, help="Multiply every scale into the factors, so that alpha = rank."
    )
    principal: Path | None = option(
        default=None,
        help="The untouched principal, where another program trained it: the deltas of the two are written.",
    )
    drop: tuple[str, ...] = option(default=(), help="A pattern of keys to leave out, such as '*.diff_b'.")
    base: Path | None = option(default=None, help=BASE_HELP)
    force: bool = option(default=False, help=FORCE_HELP)
