"""Convert a file to another spelling, dtype or form."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.adapters.alphas import scale_problems
from spectune.adapters.reader import is_essential, open_adapter
from spectune.adapters.spellings import Spelling, parse_spelling
from spectune.adapters.writer import AdapterHeader, AdapterWriter, save_tuned
from spectune.checkpoints.ema import EMA_ROOT, with_ema_as_unet
from spectune.checkpoints.open import open_checkpoint, open_writer
from spectune.core.lora import (
    Exported,
    ExportedLayer,
    check_factors,
    compare_products,
    total_error,
    with_unit_scale,
)
from spectune.core.low_rank import LowRank
from spectune.core.rounding import rounded
from spectune.errors import InputError, counted, some_of
from spectune.files.dtypes import parse_dtype
from spectune.files.pipeline import report_progress, run_pipeline
from spectune.files.provenance import spectune_version
from spectune.operation import operation
from spectune.ops.latent_space.records import MovedLatents
from spectune.ops.options.adapter_files import ConvertOptions
from spectune.ops.other_kinds import check_no_options, copy_tensors, difference_of_drop, is_other_kind
from spectune.ops.shared import (
    STALE,
    catalogue_of,
    check_stays_tuned,
    is_checkpoint,
    kept_metadata,
    refuse_overwriting,
    template_of,
    write_all,
)
from spectune.pairs.trained_principal import trained_deltas
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue


@dataclass(frozen=True)
class ConvertReport:
    """The result of `convert`. Every input tensor is in the new file, or its key is in `dropped`.

    With `ema`, the averages are in the new file under the names of the UNet, and the weights they replace are
    not.
    """

    path: Path
    hash: str
    layers: tuple[ExportedLayer, ...]  # with their rounding errors; empty if no factors were converted
    dropped: tuple[str, ...]  # keys that matched `drop`, or of moving averages
    count: int  # layers of an adapter, tensors of a checkpoint
    warnings: tuple[str, ...] = ()
    latents: MovedLatents | None = None  # with `latent_channels`

    @property
    def error(self) -> float:
        """Return the relative error of all layers together."""
        return total_error(self.layers)

    @property
    def rounded(self) -> tuple[ExportedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.error)


@operation(ConvertOptions)
def convert(options: ConvertOptions) -> ConvertReport:
    """Convert an adapter to another spelling, dtype or form, or a checkpoint to a file, shards or a folder.

    A tensor is dropped only if its key matches `drop`. With `principal`, a principal that was trained by
    another program is converted to trained deltas, spectune's own format. With `ema`, the moving averages of
    a checkpoint become its UNet. With `latent_channels`, a checkpoint moves to another latent space.
    """
    if not is_checkpoint(options.source):
        for name in ("ema", "latent_channels"):
            if getattr(options, name):
                raise InputError(f"{options.source.name} is an adapter: `{name}` applies to checkpoints")
        return _convert_adapter(options)
    default = ConvertOptions(options.source, options.out)
    names = ("dtype", "principal", "base", "even_alphas", "drop", "keys")
    if any(getattr(options, name) != getattr(default, name) for name in names):
        raise InputError(
            f"{options.source.name} is a checkpoint: only its file layout can be converted",
            hint="leave out the other options; the file name in `out` sets the layout: x.safetensors, "
            "x.safetensors.index.json, or a folder",
        )
    return _convert_checkpoint(options) if options.latent_channels is None else _move(options)


def _convert_adapter(options: ConvertOptions) -> ConvertReport:
    """Convert an adapter. The factors keep their dtype unless `dtype` is set.

    The diffusers spelling has no alpha, so the scales are multiplied into the factors, as with `even_alphas`.
    Raises InputError for a key that is not known and does not match `drop`. Progress counts layers.
    """
    out, progress = options.out, options.progress
    spelling, even = parse_spelling(options.keys), options.even_alphas
    store = None if options.dtype is None else parse_dtype(options.dtype)
    dropped = _dropped(options.source, options.drop)
    if is_other_kind(options.source, without=dropped):
        return _copy_other_kind(options, dropped)
    with ExitStack() as stack:
        catalogue = None if options.base is None else catalogue_of(options.base, out)
        opened = stack.enter_context(open_adapter(options.source, catalogue, without=dropped))
        original = _open_original(options.principal, catalogue, stack)
        refuse_overwriting(out, [opened] if original is None else [opened, original])
        source = opened if original is None else trained_deltas(opened, original)
        declared = source.provenance
        metadata = kept_metadata(source.metadata, one_file=True)
        if isinstance(source, TunedAdapter):
            check_stays_tuned(source, spelling, store, even=even)
            written = save_tuned(out, source, declared, metadata=metadata, force=options.force)
            return ConvertReport(out, written, (), dropped, len(source.layers), source.warnings)
        assert source.catalogue is not None
        layers = [layer for layer in source.catalogue if layer.name in source.layers]
        ranks = {layer.name: source.rank(layer.name) for layer in layers}
        dtypes = {layer.name: store or source.dtype(layer.name) for layer in layers}
        provenance = replace(declared, version=spectune_version()) if declared.role else declared
        reports: list[ExportedLayer] = []
        header = AdapterHeader(layers, ranks, dtypes, provenance, spelling, metadata)
        with AdapterWriter(out, header, force=options.force) as writer:

            def work(layer: Layer) -> Exported:
                one = source.layers[layer.name]
                assert isinstance(one, LowRank)
                return _converted(
                    one, dtypes[layer.name], layer.name, even=even or spelling is Spelling.DIFFUSERS
                )

            def take(layer: Layer, result: Exported) -> None:
                report_progress(progress, len(reports), len(layers), layer.name)
                writer.write_layer(layer, result.low_rank)
                reports.append(result.report)

            run_pipeline(layers, work, take, size=lambda layer: ranks[layer.name] * sum(_sides(layer)) * 16)
            report_progress(progress, len(layers), len(layers), "")
        with open_checkpoint(out) as made:
            warnings = (*opened.warnings, *scale_problems(made), *_changes(options, dropped))
    return ConvertReport(out, writer.hash, tuple(reports), dropped, len(layers), warnings)


def _copy_other_kind(options: ConvertOptions, dropped: Sequence[str]) -> ConvertReport:
    """Copy an adapter that is more than a product of two factors per layer. Progress counts tensors."""
    names = ("keys", "dtype", "even_alphas", "principal")
    check_no_options(options, ConvertOptions(options.source, options.out), names, options.source.name)
    with open_checkpoint(options.source) as source:
        refuse_overwriting(options.out, [source])
        places = {key: source for key in source.tensors if key not in dropped}
        written = copy_tensors(
            options.out, places, source.metadata, force=options.force, progress=options.progress
        )
    warnings = _changes(options, dropped)
    return ConvertReport(options.out, written, (), tuple(dropped), len(places), warnings)


def _changes(options: ConvertOptions, dropped: Sequence[str]) -> tuple[str, ...]:
    """Return a warning if a dropped key was a part of what its layer does; measure it on the base."""
    essential = [key for key in dropped if is_essential(key)]
    if not essential:
        return ()
    if options.base is None:
        measure = "pass `base` to measure by how much it differs"
    else:
        try:
            share = difference_of_drop(options.source, options.base, dropped, essential)
            measure = (
                f"its change of {options.base.name} differs by {share:.1%} of the original change (norms)"
            )
        except InputError as error:
            measure = f"by how much cannot be measured: {error.what}"
    return (
        f"{counted(len(essential), 'dropped key')} took part in the change of a layer: {some_of(essential)}. "
        f"The new file is another adapter, not the same one with fewer keys; {measure}",
    )


def _open_original(
    path: Path | None, catalogue: Catalogue | None, stack: ExitStack
) -> Adapter | TunedAdapter | None:
    return None if path is None else stack.enter_context(open_adapter(path, catalogue))


def _sides(layer: Layer) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _converted(low_rank: LowRank, store: torch.dtype, name: str, *, even: bool) -> Exported:
    if even:
        return with_unit_scale(low_rank, store, name)
    check_factors(low_rank, name)
    down, up = rounded(low_rank.down, store, name), rounded(low_rank.up, store, name)
    result = LowRank(down, up, low_rank.alpha)
    same = low_rank.down.dtype == low_rank.up.dtype == store
    return Exported(result, compare_products(low_rank, low_rank if same else result, name))


def _dropped(path: Path, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the keys that match the patterns. Raises InputError for a pattern without a match."""
    with open_checkpoint(path) as source:
        names = list(source.tensors)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"`drop` {pattern!r} matches none of the {len(names)} keys of {path.name}",
                hint="a pattern must match the full key: *.diff_b, lora_te2_*",
            )
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def _convert_checkpoint(options: ConvertOptions) -> ConvertReport:
    """Write a checkpoint in the layout that the name of `out` sets, without changing any tensor.

    With `ema`, the averages are written as the UNet. Progress counts tensors.
    """
    out, dropped = options.out, ()
    with open_checkpoint(options.source) as source:
        refuse_overwriting(out, [source])
        if options.ema:
            dropped = tuple(name for name in source.tensors if name.startswith(EMA_ROOT))
            source = with_ema_as_unet(source)
        build_catalogue(source)  # raises InputError if the file is not SDXL
        metadata = {key: value for key, value in source.metadata.items() if key not in STALE}
        infos = list(source.tensors.values())
        with open_writer(
            out, infos, metadata=metadata, force=options.force, template=template_of(source)
        ) as writer:
            write_all(source, writer, options.progress)
    return ConvertReport(out, writer.hash, (), dropped, len(infos))


def _move(options: ConvertOptions) -> ConvertReport:
    """Move a checkpoint to another latent space. Progress counts tensors."""
    from spectune.ops.latent_space.move import move  # it loads diffusers

    moved = move(options)
    return ConvertReport(options.out, moved.hash, (), moved.dropped, moved.tensors, latents=moved.latents)
