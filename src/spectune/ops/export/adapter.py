"""Exporting an adapter, or the difference of two checkpoints, as a plain LoRA file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from spectune.adapters.adapter import Adapter, TunedAdapter
from spectune.adapters.reader import open_adapter, sdxl_default_layers
from spectune.adapters.spellings import parse_spelling
from spectune.adapters.writer import AdapterHeader, AdapterWriter, check_adapter_name
from spectune.checkpoints.open import open_checkpoint
from spectune.core.lora import (
    Exported,
    ExportedLayer,
    change_singular_values,
    export_layer,
    limited_rank,
    tuned_principal,
)
from spectune.core.rank import FixedRank
from spectune.errors import InputError, some_of
from spectune.files.dtypes import parse_dtype
from spectune.files.pipeline import Progress, report_progress, run_pipeline
from spectune.files.provenance import Role, spectune_version
from spectune.files.writer import check_target
from spectune.ops.export.report import ExportReport
from spectune.ops.options.adapter_files import ExportOptions
from spectune.ops.shared import catalogue_of, kept_metadata, refuse_overwriting
from spectune.pairs.rank_plan import RankRequest, rank_request, ranks_of_spectra
from spectune.pairs.rules import check_exportable
from spectune.pairs.trained_principal import trained_deltas
from spectune.sdxl.layers import Catalogue, Layer

ExportForm = Literal["lora", "principal"]
_ALL = 1 << 30  # a rank that cuts nothing

_PLAIN_LORA = "leave out --form principal: a plain LoRA goes on the original model"


def export_adapter(options: ExportOptions) -> ExportReport:
    """Write an adapter in a form that other programs load.

    lora: a plain LoRA for the original model and its relatives, of the full rank (2r for a tuned adapter)
    or cut by a rank, an energy for each layer, or a size of the file. A LoRA becomes smaller.
    principal: the tuned factors, which replace the principal of a residual.

    Only names and shapes of `base` are read, and a few layers where the adapter does not declare its role;
    without a base, layers are looked up among SDXL's. Progress counts layers.
    """
    out, base, form, force = options.out, options.base, options.form, options.force
    store, rank, progress = parse_dtype(options.dtype), _request(options), options.progress
    check_adapter_name(out)
    catalogue = None if base is None else catalogue_of(base, out)
    with (
        open_adapter(options.tuned, catalogue) as opened,
        _Original(options.principal, catalogue) as original,
    ):
        inputs = [opened] if original is None else [opened, original]
        refuse_overwriting(out, inputs)
        check_target(out, 0, force=force)  # before the factors are looked at for an energy or a size
        source = _source(opened, original)
        if base is not None and original is None:
            with open_checkpoint(base) as weights:
                check_exportable(opened, weights)
        assert opened.catalogue is not None
        if form == "principal":
            _check_whole_principal(source, opened.catalogue, rank, whole=base is not None)
        layers = [opened.catalogue.by_name[name] for name in source.layers]
        ranks, left_out = _ranks(source, layers, rank, store, form, progress)
        kept = [layer for layer in layers if ranks[layer.name]]
        if not kept:
            raise InputError(
                f"{opened.label} changes nothing: all of its {len(layers)} layers are zero",
                hint="was it saved before it was trained?",
            )
        made_from = source.provenance
        if form == "lora":
            made_from = replace(made_from, principal_hash=None)
        metadata = kept_metadata(source.metadata, one_file=True)
        provenance = replace(made_from, role=_role(source, form), version=spectune_version())
        reports: list[ExportedLayer] = []
        header = AdapterHeader(kept, ranks, store, provenance, parse_spelling(options.keys), metadata)
        with AdapterWriter(out, header, force=force) as writer:

            def exported(layer: Layer) -> Exported:
                changed = source.layers[layer.name]
                if form == "principal":
                    assert isinstance(source, TunedAdapter)
                    return tuned_principal(source.layers[layer.name], store=store, name=layer.name)
                return export_layer(changed, rank=ranks[layer.name], store=store, name=layer.name)

            def write(layer: Layer, result: Exported) -> None:
                report_progress(progress, len(reports), len(kept), layer.name)
                writer.write_layer(layer, result.low_rank)
                reports.append(result.report)

            run_pipeline(kept, exported, write, size=lambda layer: _working_bytes(layer, ranks[layer.name]))
            report_progress(progress, len(kept), len(kept), "")
    return ExportReport(
        path=out,
        hash=writer.hash,
        layers=tuple(reports),
        left_out=left_out,
        warnings=opened.warnings,
    )


def _request(options: ExportOptions) -> RankRequest | None:
    """Return the requested cut; None keeps all."""
    given = (options.rank, options.conv_rank, options.energy, options.size)
    if all(value is None for value in given):
        return None
    if options.conv_rank is not None and options.rank is None:
        # an adapter has a rank of its own, which a rank for convolutions alone leaves to the other layers
        return FixedRank(_ALL, options.conv_rank)
    return rank_request(*given)


class _Original:
    """The untouched principal, where one is given."""

    def __init__(self, path: Path | None, catalogue: Catalogue | None) -> None:
        self._opened = None if path is None else open_adapter(path, catalogue)

    def __enter__(self) -> Adapter | TunedAdapter | None:
        return self._opened

    def __exit__(self, *error: object) -> None:
        if self._opened is not None and self._opened.file is not None:
            self._opened.file.close()


def _source(
    opened: Adapter | TunedAdapter, original: Adapter | TunedAdapter | None
) -> Adapter | TunedAdapter:
    """What holds the change: a tuned adapter, a LoRA, or a trained principal minus the original one."""
    if original is not None:
        return trained_deltas(opened, original)
    check_exportable(opened, None)
    return opened


def _role(source: Adapter | TunedAdapter, form: ExportForm) -> Role | None:
    """What the new file is; what another program made stays without a role, and is judged by its numbers."""
    if form == "principal":
        return Role.PRINCIPAL
    known = isinstance(source, TunedAdapter) or source.provenance.role is not None
    return Role.LORA if known else None


def _check_whole_principal(
    source: Adapter | TunedAdapter, catalogue: Catalogue, rank: RankRequest | None, *, whole: bool
) -> None:
    """Raise InputError unless the tuned factors can take the place of all of a residual's principal."""
    if not isinstance(source, TunedAdapter):
        raise InputError(
            f"{source.label} is a LoRA: only a tuned adapter has a principal", hint="leave out --form"
        )
    if rank is not None:
        raise InputError("a tuned principal keeps its rank", hint="leave out --rank, or export a plain LoRA")
    if source.provenance.principal_hash is None:
        raise InputError(
            f"{source.label} was not trained from the principal of a residual: there is none that it fits",
            hint=_PLAIN_LORA,
        )
    wanted = [layer.name for layer in catalogue if layer.default] if whole else list(sdxl_default_layers())
    missing = [name for name in wanted if name not in source.layers]
    if missing:
        raise InputError(
            f"{source.label} lacks {len(missing)} of {len(wanted)} layers of a principal: {some_of(missing)}",
            hint=_PLAIN_LORA if whole else "pass the model as --base if it is not of SDXL's size",
        )


def _ranks(
    source: Adapter | TunedAdapter,
    layers: Sequence[Layer],
    request: RankRequest | None,
    store: torch.dtype,
    form: ExportForm,
    progress: Progress | None,
) -> tuple[dict[str, int], tuple[ExportedLayer, ...]]:
    """The rank of every layer, 0 for those that are left out, and what is to be said of these."""
    if form == "principal":
        return {layer.name: source.rank(layer.name) for layer in layers}, ()
    if request is None or isinstance(request, FixedRank):
        return {layer.name: _fixed(source, layer, request) for layer in layers}, ()
    values: list[Tensor] = []

    def collect(layer: Layer, found: Tensor) -> None:
        values.append(found)
        report_progress(progress, len(values), len(layers), layer.name)

    run_pipeline(
        layers,
        lambda layer: change_singular_values(source.layers[layer.name], layer.name),
        collect,
        size=lambda layer: _working_bytes(layer, source.rank(layer.name)),
    )
    ranks = ranks_of_spectra(layers, values, request, store=store)
    left_out = [
        _left_out(layer, found) for layer, rank, found in zip(layers, ranks, values, strict=True) if not rank
    ]
    return {layer.name: rank for layer, rank in zip(layers, ranks, strict=True)}, tuple(left_out)


def _left_out(layer: Layer, values: Tensor) -> ExportedLayer:
    size = float(values.square().sum().sqrt())
    return ExportedLayer(layer.name, 0, len(values), size, 1.0 if size else 0.0)


def _fixed(source: Adapter | TunedAdapter, layer: Layer, request: FixedRank | None) -> int:
    wanted = None if request is None else request.requested(layer.shape)
    terms = source.rank(layer.name) * (2 if isinstance(source, TunedAdapter) else 1)
    return limited_rank(layer.shape, terms, wanted)


def _working_bytes(layer: Layer, rank: int) -> int:
    """Of the factors in float64 with their working copies, as `stream` counts what is on its way."""
    return math.ceil(2 * rank * (layer.in_features + layer.out_features) * 8)
