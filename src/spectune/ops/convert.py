"""Converting adapter files between spellings, types and forms, with nothing left out unless it is named."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.alphas import scale_problems
from spectune.adapters.reader import open_adapter
from spectune.adapters.spellings import Spelling
from spectune.adapters.writer import AdapterWriter, save_tuned
from spectune.checkpoints.open import open_checkpoint, open_writer
from spectune.core.lora import (
    Exported,
    ExportedLayer,
    check_factors,
    evened,
    same_product,
    total_error,
)
from spectune.core.low_rank import LowRank
from spectune.core.rounding import rounded
from spectune.errors import InputError
from spectune.files.pipeline import Progress, report_progress, run_pipeline
from spectune.files.provenance import spectune_version
from spectune.ops.shared import (
    STALE,
    catalogue_of,
    check_stays_tuned,
    kept_metadata,
    refuse_overwriting,
    template_of,
    write_all,
)
from spectune.pairs.trained_principal import trained_deltas
from spectune.sdxl.layers import Layer, build_catalogue


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` wrote; a tensor of the input is in the file, or its key is in `dropped`."""

    path: Path
    hash: str
    layers: tuple[ExportedLayer, ...]  # with what rounding cost; empty where no number changed hands
    dropped: tuple[str, ...]  # keys that were left out as asked
    count: int  # layers of an adapter, tensors of a checkpoint
    warnings: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Relative error of all layers together."""
        return total_error(self.layers)

    @property
    def rounded(self) -> tuple[ExportedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.error)


def convert_adapter(
    adapter: Path,
    out: Path,
    *,
    spelling: Spelling = Spelling.KOHYA,
    store: torch.dtype | None = None,
    even: bool = False,
    principal: Path | None = None,
    drop: Sequence[str] = (),
    base: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write an adapter in another spelling, with the factors in their own type or in `store`.

    `even` puts every scale into the factors, so that alpha is the rank; diffusers' spelling, which has no
    alpha, needs that anyway. With `principal`, the untouched principal from which another program trained
    `adapter`, the file holds the deltas between the two, as spectune trains them. `drop` are patterns of keys
    to leave out; a key that is neither read nor named is an InputError. Progress counts layers.
    """
    dropped = _dropped(adapter, drop)
    with ExitStack() as stack:
        catalogue = None if base is None else catalogue_of(base, out)
        opened = stack.enter_context(open_adapter(adapter, catalogue, without=dropped))
        original = None if principal is None else stack.enter_context(open_adapter(principal, catalogue))
        refuse_overwriting(out, [opened] if original is None else [opened, original])
        source = opened if original is None else trained_deltas(opened, original)
        told = source.provenance
        metadata = kept_metadata(source.metadata, one_file=True)
        if isinstance(source, TunedAdapter):
            check_stays_tuned(source, spelling, store, even=even)
            written = save_tuned(out, source, told, metadata=metadata, force=force)
            return ConvertReport(out, written, (), dropped, len(source.layers), opened.warnings)
        assert source.catalogue is not None
        layers = [layer for layer in source.catalogue if layer.name in source.layers]
        ranks = {layer.name: source.rank(layer.name) for layer in layers}
        dtypes = {layer.name: store or source.dtype(layer.name) for layer in layers}
        provenance = replace(told, version=spectune_version()) if told.role else told
        reports: list[ExportedLayer] = []
        with AdapterWriter(
            out, layers, ranks, dtype=dtypes, provenance=provenance, spelling=spelling,
            metadata=metadata, force=force,
        ) as writer:  # fmt: skip

            def work(layer: Layer) -> Exported:
                one = source.layers[layer.name]
                assert isinstance(one, LowRank)
                return _converted(
                    one, dtypes[layer.name], layer.name, even=even or spelling is Spelling.DIFFUSERS
                )

            def take(layer: Layer, result: Exported) -> None:
                report_progress(progress, len(reports), len(layers), layer.name)
                writer.write(layer, result.low_rank)
                reports.append(result.report)

            run_pipeline(layers, work, take, size=lambda layer: ranks[layer.name] * sum(_sides(layer)) * 16)
            report_progress(progress, len(layers), len(layers), "")
        with open_checkpoint(out) as made:
            warnings = (*opened.warnings, *scale_problems(made))
    return ConvertReport(out, writer.hash, tuple(reports), dropped, len(layers), warnings)


def _sides(layer: Layer) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _converted(low_rank: LowRank, store: torch.dtype, name: str, *, even: bool) -> Exported:
    if even:
        return evened(low_rank, store, name)
    check_factors(low_rank, name)
    down, up = rounded(low_rank.down, store, name), rounded(low_rank.up, store, name)
    result = LowRank(down, up, low_rank.alpha)
    same = low_rank.down.dtype == low_rank.up.dtype == store
    return Exported(result, same_product(low_rank, low_rank if same else result, name))


def _dropped(path: Path, patterns: Sequence[str]) -> tuple[str, ...]:
    """The keys that patterns name; raises InputError for one that names none."""
    with open_checkpoint(path) as source:
        names = list(source.tensors)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"--drop {pattern!r} matches none of {len(names)} keys of {path.name}",
                hint="patterns are matched with whole keys: '*.diff_b', 'lora_te2_*'",
            )
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def convert_checkpoint(
    model: Path, out: Path, *, force: bool = False, progress: Progress | None = None
) -> ConvertReport:
    """Write a checkpoint as a single file, as shards or as a diffusers folder, as the name of `out` says.

    Every tensor keeps its bits. Progress counts tensors.
    """
    with open_checkpoint(model) as source:
        refuse_overwriting(out, [source])
        build_catalogue(source)  # a file that is no SDXL is an error
        metadata = {key: value for key, value in source.metadata.items() if key not in STALE}
        infos = list(source.tensors.values())
        with open_writer(out, infos, metadata=metadata, force=force, template=template_of(source)) as writer:
            write_all(source, writer, progress)
    return ConvertReport(out, writer.hash, (), (), len(infos))
