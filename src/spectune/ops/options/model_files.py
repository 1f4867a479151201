"""Options of the operations on full models: inspect, merge, null, split, verify."""

from __future__ import annotations

from dataclasses import KW_ONLY
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from spectune.errors import InputError, counted
from spectune.operation import OperationOptions, argument, option, record
from spectune.ops.options.values import (
    DEVICE_HELP,
    FORCE_HELP,
    LAYERS_HELP,
    FactorDtype,
    ModelPath,
    ParsedSummand,
    ResidualDtype,
    WeightDtype,
    check_one_rank,
)
from spectune.training.recipe.sections.base import MOST_RANK


@record
class InspectOptions(OperationOptions):
    """Show the content of a file: parts, sizes, prediction type, factored layers and cost of each rank."""

    model: ModelPath = argument(help="A checkpoint, diffusers folder, adapter or autoencoder.")
    _: KW_ONLY
    spectrum: bool = option(
        default=False, help="Measure the energy that each rank holds, by part and block (takes minutes)."
    )
    layers: tuple[str, ...] = option(default=("default",), help=f"With `spectrum`. {LAYERS_HELP}")
    per_layer: bool = option(default=False, help="With `spectrum`: also list every layer.")
    plot: Path | None = option(default=None, help="With `spectrum`: write a plot to this .png file.")
    force: bool = option(default=False, help=FORCE_HELP)

    @model_validator(mode="after")
    def _check_plot(self) -> Self:
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise InputError(f"`plot` {self.plot}: expected a .png file", hint="for example spectrum.png")
        return self

    @property
    def measures(self) -> bool:
        """Return whether the options require the spectrum."""
        return self.spectrum or self.per_layer or self.plot is not None


@record
class MergeOptions(OperationOptions):
    """Write the weighted sum of checkpoints. Weights may be negative: A:1 B:1 C:-1 is A + (B - C)."""

    models: tuple[ParsedSummand, ...] = argument(
        metavar="FILE[:WEIGHTS]...",
        help="Checkpoints with their weights: 0.3, or by part, block and pattern, in quotes: "
        '"B.safetensors:unet=0.3,te=0,down.1=0.5". One file may be without weights: it gets the rest to 1.',
    )
    out: Path = option(
        flag="-o",
        help="The output: x.safetensors, x.safetensors.index.json (shards), or a diffusers folder.",
    )
    _: KW_ONLY
    dtype: WeightDtype | None = option(
        default=None, help="Dtype of the UNet and the text encoders. Default: as in the first file."
    )
    force: bool = option(default=False, help=FORCE_HELP)

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        bare = [summand.path.name for summand in self.models if summand.weights is None]
        if len(self.models) < 2 or len(bare) > 1:
            problem = (
                f"{len(bare)} files have no weight ({', '.join(bare)}): expected at most one"
                if len(bare) > 1
                else f"got {counted(len(self.models), 'checkpoint')}: expected two or more"
            )
            raise InputError(problem, hint="for example A.safetensors:0.7 B.safetensors:0.3")
        return self


@record
class NullOptions(OperationOptions):
    """Write a checkpoint of zeros, for programs that extract a LoRA from the difference of two models."""

    model: ModelPath = argument(help="A single-file checkpoint.")
    out: Path = option(help="The file to write.", flag="-o")
    _: KW_ONLY
    force: bool = option(default=False, help=FORCE_HELP)


@record
class SplitOptions(OperationOptions):
    """Split a checkpoint into its principal adapter and the residual model."""

    model: ModelPath = argument(help="The original checkpoint.")
    out: Path = option(default=Path(), flag="-o", help="Folder for the two files.")
    _: KW_ONLY
    rank: int | None = option(
        default=None, ge=1, le=MOST_RANK, help="Singular directions kept per layer. Default: 64."
    )
    conv_rank: int | None = option(
        default=None, ge=1, le=MOST_RANK, help="A different rank for convolutions larger than 1x1."
    )
    energy: float | None = option(
        default=None,
        ge=0,
        le=1,
        help="Instead of a rank: the share of each layer's energy to keep, such as 0.9.",
    )
    budget: str | int | None = option(
        default=None, help="Instead of a rank: the size of the principal's file, such as 600MB."
    )
    dtype: FactorDtype = option(default="float16", help="Dtype of the stored factors.")
    residual_dtype: ResidualDtype | None = option(
        default=None,
        help="Dtype of the residual. float32 makes the pair exact; an fp32 model needs float64. "
        "Default: as in the model.",
    )
    with_residual: bool = option(
        default=True,
        help="Also write the residual model.",
        off=("--no-residual", "Write the principal only."),
    )
    layers: tuple[str, ...] = option(default=("default",), help=LAYERS_HELP)
    svd: Literal["auto", "exact", "gram", "sketch"] = option(
        default="auto",
        help="SVD method. auto uses a subspace sketch, with an estimated error bound, if that is faster.",
    )
    device: str = option(default="auto", help=DEVICE_HELP)
    force: bool = option(default=False, help=FORCE_HELP)

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        check_one_rank(self.rank, self.conv_rank, self.energy, self.budget, size_name="budget")
        return self


@record
class VerifyOptions(OperationOptions):
    """Check that residual + principal, or base + tuned adapter, give a checkpoint."""

    model: ModelPath = argument(help="The original checkpoint, or a rebuilt one.")
    residual: Path = argument(help="The residual model, or the base of the tuned adapter.")
    principal: Path = argument(help="The principal, or the tuned adapter.")
