"""Export an adapter as a plain LoRA file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
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

ExportForm = Literal["lora", "principal", "tuned"]
_ALL = 1 << 30  # a rank that truncates nothing

_PLAIN_LORA = "leave out `form`: a plain LoRA works with the original model"


def export_adapter(options: ExportOptions) -> ExportReport:
    """Write an adapter in a form that other programs load.

    lora: a plain LoRA for the original model and models derived from it. It has the full rank (2r for a tuned
    adapter), or is truncated by a rank, an energy per layer, or a file size.
    principal: the tuned factors, which replace the principal of a residual.

    Only names and shapes of `base` are read, and a few layers if the adapter does not declare its role.
    Without `base`, the layers are those of SDXL. Progress counts layers.
    """
    out, base, form, force = options.out, options.base, options.form, options.force
    store, rank, progress = parse_dtype(options.dtype), _request(options), options.progress
    check_adapter_name(out)
    catalogue = None if base is None else catalogue_of(base, out)
    with (
        open_adapter(options.tuned, catalogue) as opened,
        nullcontext()
        if options.principal is None
        else open_adapter(options.principal, catalogue) as original,
    ):
        inputs = [opened] if original is None else [opened, original]
        refuse_overwriting(out, inputs)
        check_target(out, 0, force=force)  # before an energy or a size reads the factors
        source = _source(opened, original)
        if base is not None and original is None:
            with open_checkpoint(base) as weights:
                check_exportable(opened, weights)
        assert opened.catalogue is not None
        if form == "principal":
            _check_complete_principal(source, opened.catalogue, rank, has_base=base is not None)
        layers = [opened.catalogue.by_name[name] for name in source.layers]
        ranks, left_out = _ranks(source, layers, rank, store, form, progress)
        kept = [layer for layer in layers if ranks[layer.name]]
        if not kept:
            raise InputError(
                f"{opened.label} changes nothing: all its {len(layers)} layers are zero",
                hint="it may have been saved before training; pass a trained adapter",
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
        warnings=source.warnings,
    )


def _request(options: ExportOptions) -> RankRequest | None:
    """Return the requested truncation, or None if no option requests one."""
    requested = (options.rank, options.conv_rank, options.energy, options.size)
    if all(value is None for value in requested):
        return None
    if options.conv_rank is not None and options.rank is None:
        # `conv_rank` alone truncates convolutions only: the other layers keep the rank of the adapter
        return FixedRank(_ALL, options.conv_rank)
    return rank_request(*requested)


def _source(
    opened: Adapter | TunedAdapter, original: Adapter | TunedAdapter | None
) -> Adapter | TunedAdapter:
    """Return the change to export: a tuned adapter, a LoRA, or a trained principal minus the original one."""
    if original is not None:
        return trained_deltas(opened, original)
    check_exportable(opened, None)
    return opened


def _role(source: Adapter | TunedAdapter, form: ExportForm) -> Role | None:
    """Return the role of the new file, or None for a file of another program.

    Without a role, the values of the file decide what it is (pairs/rules.py).
    """
    if form == "principal":
        return Role.PRINCIPAL
    declared = isinstance(source, TunedAdapter) or source.provenance.role is not None
    return Role.LORA if declared else None


def _check_complete_principal(
    source: Adapter | TunedAdapter, catalogue: Catalogue, rank: RankRequest | None, *, has_base: bool
) -> None:
    """Raise InputError unless the tuned factors can replace the complete principal of a residual."""
    if not isinstance(source, TunedAdapter):
        raise InputError(
            f"{source.label} is a LoRA: only a tuned adapter has a principal", hint="leave out `form`"
        )
    if rank is not None:
        raise InputError(
            "a tuned principal cannot be truncated: it keeps its rank",
            hint="leave out the rank, energy or size, or leave out `form` to export a plain LoRA",
        )
    if source.provenance.principal_hash is None:
        raise InputError(
            f"{source.label} was not trained from the principal of a residual: it fits no residual",
            hint=_PLAIN_LORA,
        )
    expected = (
        [layer.name for layer in catalogue if layer.default] if has_base else list(sdxl_default_layers())
    )
    missing = [name for name in expected if name not in source.layers]
    if missing:
        raise InputError(
            f"{source.label} lacks {len(missing)} of {len(expected)} layers of a principal: "
            f"{some_of(missing)}",
            hint=_PLAIN_LORA if has_base else "pass the model as `base` if it does not have the size of SDXL",
        )


def _ranks(
    source: Adapter | TunedAdapter,
    layers: Sequence[Layer],
    request: RankRequest | None,
    store: torch.dtype,
    form: ExportForm,
    progress: Progress | None,
) -> tuple[dict[str, int], tuple[ExportedLayer, ...]]:
    """Return the rank of every layer (0 if it is left out), and reports of the layers that are left out."""
    if form == "principal":
        return {layer.name: source.rank(layer.name) for layer in layers}, ()
    if request is None or isinstance(request, FixedRank):
        return {layer.name: _fixed(source, layer, request) for layer in layers}, ()
    values: list[Tensor] = []

    def collect(layer: Layer, singular_values: Tensor) -> None:
        values.append(singular_values)
        report_progress(progress, len(values), len(layers), layer.name)

    run_pipeline(
        layers,
        lambda layer: change_singular_values(source.layers[layer.name], layer.name),
        collect,
        size=lambda layer: _working_bytes(layer, source.rank(layer.name)),
    )
    ranks = ranks_of_spectra(layers, values, request, store=store)
    left_out = [
        _left_out(layer, spectrum)
        for layer, rank, spectrum in zip(layers, ranks, values, strict=True)
        if not rank
    ]
    return {layer.name: rank for layer, rank in zip(layers, ranks, strict=True)}, tuple(left_out)


def _left_out(layer: Layer, values: Tensor) -> ExportedLayer:
    size = float(values.square().sum().sqrt())
    return ExportedLayer(layer.name, 0, len(values), size, 1.0 if size else 0.0)


def _fixed(source: Adapter | TunedAdapter, layer: Layer, request: FixedRank | None) -> int:
    requested = None if request is None else request.requested(layer.shape)
    terms = source.rank(layer.name) * (2 if isinstance(source, TunedAdapter) else 1)
    return limited_rank(layer.shape, terms, requested)


def _working_bytes(layer: Layer, rank: int) -> int:
    """Return the bytes of the factors in float64 with their working copies, for `run_pipeline`."""
    return math.ceil(2 * rank * (layer.in_features + layer.out_features) * 8)
