"""Extract a tuned adapter from a checkpoint or an adapter, so that a training can continue from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from spectune.adapters.adapter import ALPHA, DELTA_DOWN, DELTA_UP, FRAME_DOWN, FRAME_UP, Adapter, TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.adapters.writer import adapter_hash, check_adapter_name, delta_tensors
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import change
from spectune.core.linalg import norm
from spectune.core.lora import ExportedLayer, total_error
from spectune.core.low_rank import LowRank
from spectune.core.rank import FixedRank
from spectune.core.rounding import check_dtype
from spectune.core.split import split_weight
from spectune.errors import InputError, PairingError
from spectune.files.pipeline import report_progress, run_pipeline
from spectune.files.provenance import Provenance, Role, spectune_version
from spectune.files.reader import Checkpoint
from spectune.files.source import TensorInfo, declared_prediction
from spectune.files.weights_hash import WeightsHasher
from spectune.files.writer import StreamWriter
from spectune.model.device import parse_device
from spectune.ops.export.difference import compared_tensors, prediction_warning
from spectune.ops.export.extraction import Extracted, extract_delta
from spectune.ops.export.report import ExportReport
from spectune.ops.options.adapter_files import ExportOptions
from spectune.ops.shared import is_checkpoint, refuse_overwriting
from spectune.pairs.rank_plan import DEFAULT_RANK
from spectune.pairs.rules import (
    AdapterKind,
    check_base_hash,
    check_exportable,
    check_whole_model,
    short_hash,
)
from spectune.pairs.trained_principal import trained_deltas
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue
from spectune.sdxl.selection import select_layers

_LARGE_LOSS = 0.3


@dataclass(frozen=True)
class _Extraction:
    """The model, its change, and the frame that the change is expressed in."""

    before: Checkpoint
    after: Checkpoint | None  # the tuned model,
    adapter: Adapter | TunedAdapter | None  # or the adapter
    principal: Adapter | None  # the frame; None computes it from the model
    catalogue: Catalogue  # the layers of the new file
    compared: frozenset[str]  # tensors of the model that the change may include
    ranks: Mapping[str, int]
    device: torch.device | str
    hasher: WeightsHasher = field(default_factory=WeightsHasher)  # of the model

    def work(self, name: str) -> tuple[tuple[tuple[Layer, Extracted], ...], float]:
        """Return the deltas of a tensor's layers, and the norm of a change that belongs to no layer."""
        stored = self.before.load(name)
        self.hasher.add(name, stored)
        layers = self.catalogue.by_tensor.get(name, ())
        tuned = None
        if self.after is not None and name in self.compared:
            tuned = self.after.load(name)
        if not layers:
            return (), 0.0 if tuned is None else norm(tuned.float() - stored.float())
        return tuple((layer, self._extracted(layer, stored, tuned)) for layer in layers), 0.0

    def _extracted(self, layer: Layer, stored: Tensor, tuned: Tensor | None) -> Extracted:
        weight = stored[layer.row_slice]
        if tuned is not None:
            wanted = tuned[layer.row_slice].float() - weight.float()
        elif self.adapter is not None and layer.name in self.adapter.layers:
            wanted = change(self.adapter.layers[layer.name])
        else:
            wanted = torch.zeros(layer.shape)
        return extract_delta(self._frame(layer, weight), wanted, name=layer.name, device=self.device)

    def _frame(self, layer: Layer, weight: Tensor) -> LowRank:
        if self.principal is not None:
            return self.principal.layers[layer.name]
        # float32, as the frames that a training computes
        rank, name = self.ranks[layer.name], layer.name
        return split_weight(weight, rank=rank, store=torch.float32, device=self.device, name=name).low_rank

    def infos(self) -> list[TensorInfo]:
        """Return the tensors of the new file."""
        infos: list[TensorInfo] = []
        for layer in self.catalogue:
            down, up = layer.factor_shapes(self.ranks[layer.name])
            frame = torch.float32 if self.principal is None else self.principal.dtype(layer.name)
            for suffix, dtype, shape in (
                (FRAME_DOWN, frame, down),
                (FRAME_UP, frame, up),
                (ALPHA, torch.float32, ()),
                (DELTA_DOWN, torch.float32, down),
                (DELTA_UP, torch.float32, up),
            ):
                infos.append(TensorInfo(f"{layer.kohya}.{suffix}", dtype, shape))
        return infos


def export_tuned(options: ExportOptions) -> ExportReport:
    """Write the tuned adapter whose change is closest to that of a checkpoint or an adapter.

    Its frame is the principal of `base`, computed at `rank` or read from `principal`. The report contains the
    loss of each layer. Layers without a change have deltas of zero. Progress counts tensors.

    Raises InputError or PairingError for files that do not belong together.
    """
    _check_options(options)
    assert options.base is not None
    with ExitStack() as stack:
        extraction, warnings = _opened(stack, options, options.base)
        names, done = list(extraction.before.tensors), 0
        reports: dict[str, ExportedLayer] = {}
        outside: dict[str, float] = {}
        writer = StreamWriter(options.out, extraction.infos(), force=options.force)

        def consume(name: str, result: tuple[tuple[tuple[Layer, Extracted], ...], float]) -> None:
            nonlocal done
            layers, lost = result
            for layer, extracted in layers:
                for key, tensor in delta_tensors(layer.kohya, extracted.delta).items():
                    writer.write(key, tensor)
                reports[layer.name] = extracted.report
            if lost:
                outside[name] = lost
            report_progress(options.progress, done, len(names), name)
            done += 1

        with writer:
            run_pipeline(
                names, extraction.work, consume, size=lambda name: 6 * extraction.before.tensors[name].nbytes
            )
            report_progress(options.progress, done, done, "")
            layers = tuple(reports[layer.name] for layer in extraction.catalogue)
            if not any(layer.norm for layer in layers):
                raise InputError(
                    f"no layer of {options.tuned.name} differs from {extraction.before.label}",
                    hint="pass the tuned model or adapter as `tuned`, and the model it was made from as "
                    "`base`",
                )
            provenance, found = _provenance(extraction)
            warnings += [*filter(None, [found]), *_loss_warning(layers)]
            writer.metadata.update(provenance.to_metadata())
    return ExportReport(options.out, writer.hash, layers, outside=outside, warnings=tuple(warnings))


def _check_options(options: ExportOptions) -> None:
    if options.base is None:
        raise InputError(
            "a tuned adapter needs the model that it changes: `base` is missing",
            hint="pass the model that TUNED was made from as `base`",
        )
    default = ExportOptions(options.tuned, options.out)
    unused = [
        name for name in ("energy", "size", "keys", "dtype") if vars(options)[name] != vars(default)[name]
    ]
    if options.principal is not None:
        unused += [name for name in ("rank", "conv_rank") if vars(options)[name] is not None]
    if unused:
        raise InputError(
            f"{', '.join(f'`{name}`' for name in unused)} cannot apply to a tuned adapter"
            + (": the principal has its ranks" if options.principal else ""),
            hint="leave out " + ", ".join(f"`{name}`" for name in unused),
        )
    check_adapter_name(options.out)


def _opened(stack: ExitStack, options: ExportOptions, base: Path) -> tuple[_Extraction, list[str]]:
    """Open the model, its tuned version and the principal; return them with warnings.

    Raises InputError or PairingError if they do not belong together.
    """
    before = stack.enter_context(open_checkpoint(base))
    check_whole_model(before)
    every = build_catalogue(before, all_layers=True)
    principal = _principal(stack, options.principal, every)
    after = adapter = None
    names: Sequence[str] = ()
    if is_checkpoint(options.tuned):
        after = stack.enter_context(open_checkpoint(options.tuned))
        check_whole_model(after)
        names, found = compared_tensors(after, before)
        warnings = [*found, *prediction_warning(after, before)]
    else:
        adapter = opened = stack.enter_context(open_adapter(options.tuned, every))
        warnings = list(opened.warnings)
        if principal is not None and AdapterKind.of(opened) is AdapterKind.TRAINED:
            adapter = trained_deltas(opened, principal)
        else:
            check_exportable(opened, before)
    refuse_overwriting(options.out, [one for one in (before, after, adapter, principal) if one is not None])
    chosen = _chosen(options, every, adapter, principal)
    for layer in chosen:
        check_dtype(before.tensors[layer.tensor].dtype, f"layer {layer.name} of {before.label}")
    requested = FixedRank(options.rank or DEFAULT_RANK, options.conv_rank)
    ranks = {
        layer.name: requested.true_rank(layer.shape) if principal is None else principal.rank(layer.name)
        for layer in chosen
    }
    excluded = frozenset[str]()
    if options.layers is not None:  # layers that the user excludes do not count as lost
        excluded = frozenset(layer.tensor for layer in every if layer.default and layer not in chosen)
    catalogue = Catalogue(tuple(chosen), every.unet)
    device = parse_device(options.device)
    compared = frozenset(names) - excluded
    return _Extraction(before, after, adapter, principal, catalogue, compared, ranks, device), warnings


def _principal(stack: ExitStack, path: Path | None, catalogue: Catalogue) -> Adapter | None:
    if path is None:
        return None
    principal = stack.enter_context(open_adapter(path, catalogue))
    if isinstance(principal, TunedAdapter) or AdapterKind.of(principal) is AdapterKind.TRAINED:
        raise InputError(
            f"{principal.label} is trained: expected the principal that `spectune split` wrote",
            hint="leave out `principal`: it is computed from the model",
        )
    return principal


def _chosen(
    options: ExportOptions,
    catalogue: Catalogue,
    adapter: Adapter | TunedAdapter | None,
    principal: Adapter | None,
) -> list[Layer]:
    """Return the layers of the new file: those of the principal, or the selected and the adapter's layers."""
    changed: set[str] = set() if adapter is None else set(adapter.layers)
    if principal is not None:
        missing = changed - set(principal.layers)
        if missing:
            raise InputError(
                f"{len(missing)} of {len(changed)} layers of {options.tuned.name} are not in "
                f"{principal.label}",
                hint="leave out `principal`: it is computed from the model",
            )
        return [layer for layer in catalogue if layer.name in principal.layers]
    selected = {layer.name for layer in select_layers(catalogue, options.layers or ("default",))}
    return [layer for layer in catalogue if layer.name in selected | changed]


def _provenance(extraction: _Extraction) -> tuple[Provenance, str]:
    """Return the provenance of the new file, and a warning if the adapter was made for another model."""
    before, source = extraction.before, extraction.after or extraction.adapter
    assert source is not None
    found = extraction.hasher.hexdigest()
    warning, principal = "", extraction.principal
    if extraction.adapter is not None:
        warning = check_base_hash(found, extraction.adapter, before.label)
    if principal is not None and principal.provenance.base_hash not in (None, found):
        raise PairingError(
            f"{principal.label} was split from base {short_hash(principal.provenance.base_hash)}, "
            f"{before.label} is {short_hash(found)}",
            hint="pass the principal of this model, or leave out `principal`",
        )
    prediction = source.provenance.prediction
    if extraction.after is not None:
        prediction = declared_prediction(extraction.after)
    provenance = replace(
        source.provenance,
        role=Role.TUNED,
        version=spectune_version(),
        base_hash=found,
        base_name=before.label,
        principal_hash=None if principal is None else adapter_hash(principal),
        frame="principal" if principal is None else None,
        prediction=prediction,
    )
    return provenance, warning


def _loss_warning(layers: Sequence[ExportedLayer]) -> list[str]:
    error = total_error(layers)
    if error <= _LARGE_LOSS:
        return []
    return [
        f"{error:.0%} of the change is lost, because it is outside the principal directions: pass a higher "
        "`rank`; to keep the whole change, use the model or the adapter itself as the base of the training"
    ]
