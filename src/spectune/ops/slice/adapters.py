"""Combine layers of one or several adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from spectune.adapters.adapter import Adapter, LazyLayers, TunedAdapter
from spectune.adapters.alphas import scale_problems
from spectune.adapters.reader import open_adapter
from spectune.adapters.spellings import Spelling, parse_spelling
from spectune.adapters.traits import read_traits
from spectune.adapters.writer import AdapterHeader, AdapterWriter, save_tuned
from spectune.checkpoints.open import open_checkpoint
from spectune.core.combine import Term, sum_terms
from spectune.core.delta import Delta
from spectune.core.lora import Exported, ExportedLayer, limited_rank, total_error
from spectune.core.low_rank import common_dtype
from spectune.errors import InputError, some_of
from spectune.files.dtypes import parse_dtype
from spectune.files.pipeline import Progress, report_progress, run_pipeline
from spectune.files.provenance import Provenance, Role, spectune_version
from spectune.ops.options.adapter_files import SliceOptions
from spectune.ops.shared import (
    catalogue_of,
    check_stays_tuned,
    kept_metadata,
    refuse_overwriting,
)
from spectune.ops.slice.plan import (
    SlicePlan,
    SliceResult,
    provenance_of,
    role_of,
    slices_metadata,
)
from spectune.sdxl.layers import Layer


@dataclass(frozen=True)
class SliceReport:
    """The result of `slice` for adapters."""

    path: Path
    hash: str
    role: Role  # lora, tuned or principal
    slices: tuple[SliceResult, ...]
    layers: tuple[ExportedLayer, ...]  # with their rounding errors; empty for the role tuned
    overlaps: tuple[str, ...]  # layers that are sums of several slices
    warnings: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Return the relative error of all layers together."""
        return total_error(self.layers)


def slice_adapters(options: SliceOptions) -> SliceReport:
    """Write an adapter that combines layers of one or several adapters.

    A layer that several slices contain becomes their exact sum; if `overlap` is off, it is an InputError.
    Alphas are kept, and a weight is applied once. Tuned adapters of one model give a tuned adapter if each
    layer comes from one of them with weight 1; otherwise, or together with LoRAs, they become a LoRA. The
    factors keep the dtype of the files; factors from tuned adapters are float16. Progress counts layers.

    Raises PairingError for files that cannot be combined into one adapter.
    """
    slices, out, force, progress = options.slices, options.out, options.force, options.progress
    spelling = parse_spelling(options.keys)
    store = None if options.dtype is None else parse_dtype(options.dtype)
    traits = {} if options.traits is None else read_traits(options.traits)
    with ExitStack() as stack:
        catalogue = None if options.base is None else catalogue_of(options.base, out)
        opened: dict[Path, Adapter | TunedAdapter] = {}
        for piece in slices:
            if piece.path not in opened:
                opened[piece.path] = stack.enter_context(open_adapter(piece.path, catalogue))
        refuse_overwriting(out, list(opened.values()))
        plan = SlicePlan.of(slices, opened, traits)
        if plan.overlaps and not options.overlap:
            raise InputError(
                f"{len(plan.overlaps)} layers are in more than one slice: {some_of(plan.overlaps)}",
                hint="turn `overlap` on to sum them, or choose traits that do not overlap",
            )
        role, warnings = role_of(plan, opened)
        declared = any(
            isinstance(adapter, TunedAdapter) or adapter.provenance.role is not None
            for adapter in opened.values()
        )
        provenance = provenance_of(plan, opened, role)
        # A file of other programs stays without a role: its values decide what it is (pairs/rules.py).
        provenance = replace(provenance, role=role if declared else None, version=spectune_version())
        metadata = kept_metadata(opened[plan.leading].metadata, one_file=len(opened) == 1)
        metadata |= slices_metadata(slices)
        warnings = (*(text for adapter in opened.values() for text in adapter.warnings), *warnings)
        if role is Role.TUNED:
            check_stays_tuned(opened[slices[0].path], spelling, store)
            written = _write_tuned(plan, opened, out, provenance, metadata, force=force)
            reports: list[ExportedLayer] = []
        else:
            written, reports = _write(
                plan, opened, out, provenance, metadata, store, spelling, force=force, progress=progress
            )
            with open_checkpoint(out) as made:
                warnings = (*warnings, *scale_problems(made))
    return SliceReport(out, written, role, plan.results, tuple(reports), plan.overlaps, warnings)


def _write_tuned(
    plan: SlicePlan,
    opened: Mapping[Path, Adapter | TunedAdapter],
    out: Path,
    provenance: Provenance,
    metadata: Mapping[str, str],
    *,
    force: bool,
) -> str:
    adapters = {layer.name: opened[plan.sources[layer.name][0].path] for layer in plan.layers}
    ranks = {name: adapter.rank(name) for name, adapter in adapters.items()}

    def read(name: str) -> Delta:
        delta = adapters[name].layers[name]
        assert isinstance(delta, Delta)
        return delta

    dtypes = dict.fromkeys(ranks, torch.float32)
    tuned = TunedAdapter(LazyLayers(ranks, dtypes, read), metadata, out.name)
    return save_tuned(out, tuned, provenance, metadata=metadata, force=force)


def _write(
    plan: SlicePlan,
    opened: Mapping[Path, Adapter | TunedAdapter],
    out: Path,
    provenance: Provenance,
    metadata: Mapping[str, str],
    store: torch.dtype | None,
    spelling: Spelling,
    *,
    force: bool,
    progress: Progress | None,
) -> tuple[str, list[ExportedLayer]]:
    ranks = {layer.name: _rank(layer, plan, opened) for layer in plan.layers}
    dtypes = {layer.name: store or _dtype(layer, plan, opened) for layer in plan.layers}
    reports: list[ExportedLayer] = []
    header = AdapterHeader(plan.layers, ranks, dtypes, provenance, spelling, metadata)
    with AdapterWriter(out, header, force=force) as writer:

        def work(layer: Layer) -> Exported:
            pieces = plan.sources[layer.name]
            terms = [Term(opened[piece.path].layers[layer.name], piece.weight) for piece in pieces]
            return sum_terms(terms, dtypes[layer.name], layer.name, unit_scale=spelling is Spelling.DIFFUSERS)

        def take(layer: Layer, result: Exported) -> None:
            report_progress(progress, len(reports), len(plan.layers), layer.name)
            writer.write_layer(layer, result.low_rank)
            reports.append(result.report)

        run_pipeline(plan.layers, work, take, size=lambda layer: ranks[layer.name] * _side(layer) * 16)
        report_progress(progress, len(reports), len(plan.layers), "")
    return writer.hash, reports


def _side(layer: Layer) -> int:
    return layer.in_features + layer.out_features


def _rank(layer: Layer, plan: SlicePlan, opened: Mapping[Path, Adapter | TunedAdapter]) -> int:
    adapters = [opened[piece.path] for piece in plan.sources[layer.name]]
    terms = sum(
        adapter.rank(layer.name) * (2 if isinstance(adapter, TunedAdapter) else 1) for adapter in adapters
    )
    # a layer that is not summed keeps its rank, even above the full rank
    return terms if len(adapters) == 1 and isinstance(adapters[0], Adapter) else limited_rank(
        layer.shape, terms, None
    )  # fmt: skip


def _dtype(layer: Layer, plan: SlicePlan, opened: Mapping[Path, Adapter | TunedAdapter]) -> torch.dtype:
    """Return the common dtype of the factors; float16 for trained deltas, which are factored again."""
    adapters = [opened[piece.path] for piece in plan.sources[layer.name]]
    dtypes = [
        torch.float16 if isinstance(adapter, TunedAdapter) else adapter.dtype(layer.name)
        for adapter in adapters
    ]
    return common_dtype(dtypes)
