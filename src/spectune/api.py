"""The library as one would call it from Python: the same operations, words and defaults as the command line.

Paths may be strings; types, ranks and strengths are written as on the command line. `progress` is called with
what is done, the total, and the name at hand. All failures that the user can mend are a SpectuneError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from spectune.adapters.spellings import parse_spelling
from spectune.adapters.traits import read_traits
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError, PairingError, SpectuneError
from spectune.files.dtypes import parse_dtype, parse_residual_dtype, parse_weight_dtype
from spectune.files.pipeline import Progress
from spectune.ops import inspect as describe
from spectune.ops.convert import ConvertReport, convert_adapter, convert_checkpoint
from spectune.ops.export.adapter import ExportForm, ExportReport, export_adapter
from spectune.ops.export.difference import export_difference
from spectune.ops.rebuild import RebuildReport, rebuild_checkpoint
from spectune.ops.slice.adapters import SliceReport, slice_adapters
from spectune.ops.slice.parts import SwapReport, swap_parts
from spectune.ops.slice.plan import Slice, parse_slice
from spectune.ops.split import SplitReport, split_checkpoint
from spectune.ops.verify import verify_files
from spectune.pairs.comparison import VerifyReport
from spectune.pairs.layer_ranks import FixedRank, RankRequest, parse_ranks
from spectune.pairs.strength import parse_strength

if TYPE_CHECKING:
    from spectune.training.callbacks import Callbacks, TrainReport

__all__ = [
    "InputError",
    "PairingError",
    "SpectuneError",
    "convert",
    "export",
    "inspect",
    "rebuild",
    "slice",
    "split",
    "train",
    "verify",
]

_ALL = 1 << 30  # a rank that cuts nothing

AnyPath = str | PathLike[str]


def inspect(model: AnyPath) -> describe.ModelSummary | describe.AdapterSummary:
    """What a checkpoint, a diffusers folder or an adapter is, from its header alone."""
    with open_checkpoint(Path(model)) as source:
        if describe.is_adapter(source):
            return describe.describe_adapter(source)
        return describe.describe_model(source)


def split(
    model: AnyPath,
    out: AnyPath = ".",
    *,
    rank: int | None = None,
    conv_rank: int | None = None,
    energy: float | None = None,
    budget: str | None = None,
    dtype: str = "float16",
    residual_dtype: str | None = None,
    with_residual: bool = True,
    layers: Sequence[str] = ("default",),
    svd: str = "auto",
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> SplitReport:
    """Split a checkpoint into its principal adapter and the residual model, two files in the folder `out`.

    Ranks are 64 unless `rank`, `energy` (a share of each layer's) or `budget` ("600MB") says otherwise.
    `residual_dtype` "float32" makes the pair exact. Raises InputError for what is no whole SDXL model.
    """
    if svd not in ("auto", "exact", "gram", "sketch"):
        raise InputError(f"unknown SVD method {svd!r}", hint="auto or exact")
    return split_checkpoint(
        Path(model),
        Path(out),
        ranks=parse_ranks(rank, conv_rank, energy, budget),
        store=parse_dtype(dtype),
        residual_dtype=None if residual_dtype is None else parse_residual_dtype(residual_dtype),
        with_residual=with_residual,
        layers=layers,
        method=svd,
        device=device,
        force=force,
        progress=progress,
    )


def verify(
    model: AnyPath, residual: AnyPath, principal: AnyPath, *, progress: Progress | None = None
) -> VerifyReport:
    """Compare a model, tensor by tensor, with what its residual and principal make together; see `.ok`."""
    return verify_files(Path(model), Path(residual), Path(principal), progress=progress)


def rebuild(
    adapter: AnyPath,
    base: AnyPath,
    out: AnyPath,
    *,
    strength: float | str | Mapping[str, float] = 1.0,
    dtype: str | None = None,
    cast_all: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> RebuildReport:
    """Write the full checkpoint that an adapter makes of a base, or a principal of its residual.

    `strength` is one number, or one by part: {"unet": 0.8, "te": 0.5} or "unet=0.8,te=0.5". `dtype` (float16,
    bfloat16, float32, float8_e4m3fn, float8_e5m2) is that of changed tensors; with `cast_all` of all of the
    UNet and the encoders.
    """
    return rebuild_checkpoint(
        Path(adapter),
        Path(base),
        Path(out),
        strength=parse_strength(strength) if isinstance(strength, str) else strength,
        dtype=None if dtype is None else parse_weight_dtype(dtype),
        cast_all=cast_all,
        force=force,
        progress=progress,
    )


def export(
    source: AnyPath,
    out: AnyPath,
    *,
    base: AnyPath | None = None,
    rank: int | None = None,
    conv_rank: int | None = None,
    energy: float | None = None,
    size: str | None = None,
    form: ExportForm = "lora",
    keys: str = "kohya",
    dtype: str = "float16",
    principal: AnyPath | None = None,
    layers: Sequence[str] | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a plain LoRA of a tuned adapter, of a LoRA, of a trained principal, or of a tuned checkpoint.

    A checkpoint needs `base`, the model it was made from, and takes rank 64 if nothing else is said; adapters
    keep their full rank. `rank`, `energy` or `size` ("150MB") cut. `principal` is the untouched principal
    where `source` is that one as another program trained it. `keys` is kohya, diffusers or comfyui.
    """
    spelling = parse_spelling(keys)
    if form not in ("lora", "principal"):
        raise InputError(f"unknown form {form!r}", hint="lora or principal")
    cut = any(value is not None for value in (rank, conv_rank, energy, size))
    ranks: RankRequest | None = (
        parse_ranks(rank, conv_rank, energy, size, budget_word="size") if cut else None
    )
    with open_checkpoint(Path(source)) as opened:
        is_adapter = describe.is_adapter(opened)
    if is_adapter:
        if layers is not None:
            raise InputError(
                "--layers is for checkpoints", hint="`spectune slice` takes layers of an adapter"
            )
        return export_adapter(
            Path(source),
            None if base is None else Path(base),
            Path(out),
            # an adapter has a rank of its own, which a rank for convolutions alone leaves to the others
            rank=FixedRank(_ALL, conv_rank) if conv_rank is not None and rank is None else ranks,
            store=parse_dtype(dtype),
            form=form,
            spelling=spelling,
            principal=None if principal is None else Path(principal),
            force=force,
            progress=progress,
        )
    if base is None:
        raise InputError(
            f"{Path(source).name} is a whole model: its LoRA is its difference from another",
            hint="pass the model it was made from as --base",
        )
    if form != "lora" or principal is not None:
        raise InputError(
            f"{Path(source).name} is a whole model, whose difference is a plain LoRA",
            hint="leave out --form and --principal",
        )
    return export_difference(
        Path(source),
        Path(base),
        Path(out),
        ranks=ranks,
        store=parse_dtype(dtype),
        spelling=spelling,
        layers=layers or ("default",),
        device=device,
        force=force,
        progress=progress,
    )


def slice(
    slices: Sequence[str | Slice],
    out: AnyPath,
    *,
    traits: AnyPath | None = None,
    base: AnyPath | None = None,
    keys: str = "kohya",
    dtype: str | None = None,
    overlap: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> SliceReport | SwapReport:
    """Put parts of files together: "style.safetensors:unet:0.8", "face.safetensors:te".

    Of adapters, layers by trait (te, unet, content, style, a block, a pattern, a name in the JSON file
    `traits`), summed where they overlap; of checkpoints, whole parts (unet, te1, te2, vae).
    """
    pieces = [piece if isinstance(piece, Slice) else parse_slice(piece) for piece in slices]
    if not pieces:
        raise InputError("nothing to put together", hint="name files like style.safetensors:te")
    whole = {path: _is_checkpoint(path) for path in dict.fromkeys(piece.path for piece in pieces)}
    if len(set(whole.values())) > 1:
        model, adapter = (next(path.name for path in whole if whole[path] is kind) for kind in (True, False))
        raise InputError(
            f"{model} is a checkpoint and {adapter} an adapter: expected files of one kind",
            hint="`spectune rebuild` puts an adapter into a checkpoint",
        )
    if all(whole.values()):
        if traits is not None or base is not None or keys != "kohya" or dtype is not None or not overlap:
            raise InputError(
                "parts of checkpoints are copied as they are",
                hint="leave out --traits, --base, --keys, --dtype and --no-overlap",
            )
        return swap_parts(pieces, Path(out), force=force, progress=progress)
    return slice_adapters(
        pieces,
        Path(out),
        traits=None if traits is None else read_traits(Path(traits)),
        base=None if base is None else Path(base),
        store=None if dtype is None else parse_dtype(dtype),
        spelling=parse_spelling(keys),
        overlap=overlap,
        force=force,
        progress=progress,
    )


def convert(
    source: AnyPath,
    out: AnyPath,
    *,
    keys: str = "kohya",
    dtype: str | None = None,
    even_alphas: bool = False,
    principal: AnyPath | None = None,
    drop: Sequence[str] = (),
    base: AnyPath | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write an adapter in another spelling, type or form; or a checkpoint as one file, shards or a folder.

    Nothing is left out but keys that `drop` names. `principal` turns a principal that another program trained
    into the deltas that spectune trains.
    """
    if _is_checkpoint(Path(source)):
        asked = (dtype, principal, base)
        if any(value is not None for value in asked) or even_alphas or drop or keys != "kohya":
            raise InputError(
                f"{Path(source).name} is a whole model: only its kind of file can be converted",
                hint="the output's name says which: x.safetensors, x.safetensors.index.json, or a folder",
            )
        return convert_checkpoint(Path(source), Path(out), force=force, progress=progress)
    return convert_adapter(
        Path(source),
        Path(out),
        spelling=parse_spelling(keys),
        store=None if dtype is None else parse_dtype(dtype),
        even=even_alphas,
        principal=None if principal is None else Path(principal),
        drop=drop,
        base=None if base is None else Path(base),
        force=force,
        progress=progress,
    )


def train(
    recipe: AnyPath,
    *,
    overrides: Sequence[str] = (),
    callbacks: Sequence[Callbacks] = (),
    force: bool = False,
) -> TrainReport:
    """Train a recipe in TOML to its end, or on from its newest state; overrides are like "run.steps=200"."""
    # diffusers and accelerate take seconds to load, and files need neither
    from spectune.training.loop import train as run_training
    from spectune.training.recipe.file import load_recipe

    return run_training(load_recipe(Path(recipe), overrides), callbacks=callbacks, force=force)


def _is_checkpoint(path: Path) -> bool:
    with open_checkpoint(path) as source:
        return not describe.is_adapter(source)
