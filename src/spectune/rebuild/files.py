"""The operations on whole files: what the commands split, rebuild, export and verify do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from spectune.errors import InputError, some_of
from spectune.factor.rank import FixedRank, rank_of
from spectune.factor.report import Agreement, LayerReport, total_energy, total_share
from spectune.factor.rounding import check_dtype
from spectune.factor.svd import Method
from spectune.rebuild.export import ExportedLayer, export_layer, exported_rank, total_error, tuned_principal
from spectune.rebuild.merge import merged
from spectune.rebuild.pairing import LAYER_COUNT_KEY, base_dtypes_metadata, check_base_hash
from spectune.rebuild.splitting import SplitPlan, split_tensor
from spectune.rebuild.verify import VerifyReport, verify
from spectune.weights.adapter import Adapter, AdapterWriter, TunedAdapter, open_adapter
from spectune.weights.catalogue import Catalogue, build_catalogue
from spectune.weights.provenance import (
    Provenance,
    Role,
    WeightsHasher,
    declared_prediction,
    spectune_version,
)
from spectune.weights.reader import INDEX_SUFFIX, Checkpoint, TensorInfo, WeightSource, open_checkpoint
from spectune.weights.writer import StreamWriter, refuse_inputs

Progress = Callable[[int, int, str], None]  # done, total, name of what is at hand
ExportForm = Literal["lora", "principal"]

_PLAIN_LORA = "leave out --form principal: a plain LoRA goes on the original model"

# True of the bytes of the original file only.
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True)
class SplitReport:
    """What `split` wrote and measured; agreements say how the stored pair makes each tensor again."""

    principal: Path
    residual: Path | None
    base_hash: str
    principal_hash: str
    layers: tuple[LayerReport, ...]
    agreements: Mapping[str, Agreement]  # by tensor, the factored ones; empty without a residual

    @property
    def energy(self) -> float:
        """The share of the squared norm of all factored weights that the principal holds, 0..1."""
        return total_energy(self.layers)

    @property
    def share(self) -> float:
        """The bit-equal share of the factored numbers when the pair is put together again, 0..1."""
        return total_share(self.agreements.values())

    @property
    def exact(self) -> bool:
        return all(agreement.exact for agreement in self.agreements.values())

    @property
    def max_ulp(self) -> int:
        return max((agreement.max_ulp for agreement in self.agreements.values()), default=0)

    @property
    def capped(self) -> tuple[LayerReport, ...]:
        """Layers smaller than the rank that was asked for."""
        return tuple(layer for layer in self.layers if layer.capped)


@dataclass(frozen=True)
class RebuildReport:
    """What `rebuild` wrote; hashes are of the numbers, not of the files."""

    path: Path
    hash: str
    base_hash: str  # of the file that was built upon
    original_hash: str | None  # of the model that the files were made from, if they say so
    changed_tensors: int  # whose bits, type or shape are not those of the base
    tensors: int
    warnings: tuple[str, ...] = ()  # of the adapter

    @property
    def identical(self) -> bool:
        """Every bit is that of the original model, or where none is recorded, of the base."""
        return self.hash == (self.original_hash or self.base_hash)


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote, with the loss of each layer."""

    path: Path
    hash: str
    layers: tuple[ExportedLayer, ...]

    @property
    def error(self) -> float:
        """Relative error of the change of all layers together."""
        return total_error(self.layers)

    @property
    def worst(self) -> ExportedLayer:
        return max(self.layers, key=lambda layer: layer.error)


def principal_name(stem: str, rank: int) -> str:
    """The file name of a principal adapter: `base.principal-r64.safetensors`."""
    return f"{stem}.principal-r{rank}.safetensors"


def residual_name(stem: str) -> str:
    """The file name of a residual model: `base.residual.safetensors`."""
    return f"{stem}.residual.safetensors"


def checkpoint_stem(path: Path) -> str:
    """The name of a checkpoint without its suffixes; of a folder, its own name."""
    return path.resolve().name.removesuffix(INDEX_SUFFIX).removesuffix(".safetensors")


def split_checkpoint(
    model: Path,
    folder: Path,
    *,
    rank: int = 64,
    conv_rank: int | None = None,
    store: torch.dtype = torch.float16,
    residual_dtype: torch.dtype | None = None,
    with_residual: bool = True,
    all_layers: bool = False,
    method: Method = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> SplitReport:
    """Write the principal adapter of `model` and, unless told otherwise, its residual model into `folder`.

    `residual_dtype` None keeps each tensor's own type; float32 makes the pair exact for fp16
    models, but for rare numbers whose principal part is 0.5 or larger; the report counts them.
    Progress counts tensors. Raises InputError when `model` is itself only a part of a model.
    """
    plan = SplitPlan(FixedRank(rank, conv_rank), store, residual_dtype, method)
    with open_checkpoint(model) as base:
        _refuse_parts(base)
        catalogue = build_catalogue(base, all_layers=all_layers)
        for layer in catalogue:
            check_dtype(base.tensors[layer.tensor].dtype, f"layer {layer.name} of {base.label}")
        folder.mkdir(parents=True, exist_ok=True)
        stem = checkpoint_stem(model)
        principal = folder / principal_name(stem, rank)
        residual = folder / residual_name(stem) if with_residual else None
        origin = _origin(base)
        with _residual_writer(residual, base, catalogue, plan, force=force) as residual_writer:
            with AdapterWriter(
                principal,
                catalogue.layers,
                {layer.name: rank_of(plan.rule, layer.shape) for layer in catalogue},
                dtype=store,
                provenance=replace(origin, role=Role.PRINCIPAL),
                force=force,
            ) as writer:
                base_hash, reports, agreements = _split_all(
                    base, catalogue, plan, writer, residual_writer, progress
                )
                origin = replace(origin, base_hash=base_hash)
                writer.metadata.update(replace(origin, role=Role.PRINCIPAL).to_metadata())
            if residual_writer is not None:
                made_from = replace(origin, role=Role.RESIDUAL, principal_hash=writer.hash)
                residual_writer.metadata.update(made_from.to_metadata())
    return SplitReport(
        principal=principal,
        residual=residual,
        base_hash=base_hash,
        principal_hash=writer.hash,
        layers=tuple(reports),
        agreements=agreements if with_residual else {},
    )


def _split_all(
    base: WeightSource,
    catalogue: Catalogue,
    plan: SplitPlan,
    writer: AdapterWriter,
    residual_writer: StreamWriter | None,
    progress: Progress | None,
) -> tuple[str, list[LayerReport], dict[str, Agreement]]:
    """Split tensor by tensor; the weights hash of the base, the reports, the agreements by tensor."""
    hasher = WeightsHasher()
    reports: list[LayerReport] = []
    agreements: dict[str, Agreement] = {}
    for done, name in enumerate(base.tensors):
        _tell(progress, done, len(base.tensors), name)
        tensor = base.load(name)
        hasher.add(name, tensor)
        layers = catalogue.by_tensor.get(name)
        if layers is not None:
            split = split_tensor(tensor, layers, plan)
            for layer, low_rank in split.low_ranks:
                writer.write(layer, low_rank)
            reports += split.reports
            agreements[name] = split.agreement
            tensor = split.residual
        if residual_writer is not None:
            residual_writer.write(name, tensor)
    _tell(progress, len(base.tensors), len(base.tensors), "")
    return hasher.hexdigest(), reports, agreements


def _residual_writer(
    path: Path | None, base: WeightSource, catalogue: Catalogue, plan: SplitPlan, *, force: bool
) -> StreamWriter | nullcontext[None]:
    if path is None:
        return nullcontext()
    infos = [
        replace(info, dtype=plan.residual_dtype or info.dtype) if name in catalogue.by_tensor else info
        for name, info in base.tensors.items()
    ]
    other = {info.name: base.tensors[info.name].dtype for info in infos if info != base.tensors[info.name]}
    kept = {key: value for key, value in base.metadata.items() if key not in _STALE}
    metadata = {**kept, LAYER_COUNT_KEY: str(len(catalogue)), **base_dtypes_metadata(other)}
    return StreamWriter(path, infos, metadata=metadata, force=force)


def rebuild_checkpoint(
    adapter: Path,
    base: Path,
    out: Path,
    *,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> RebuildReport:
    """Write the whole model: original + tuned adapter or LoRA, or residual + principal.

    Tensors that nothing changes are carried byte for byte. Progress counts tensors. Raises PairingError,
    and leaves no file, when the adapter records another base than the one that was read.
    """
    with (
        open_checkpoint(base) as source,
        open_adapter(adapter, build_catalogue(source, all_layers=True)) as opened,
    ):
        _refuse_inputs(out, source, opened)
        hashed = _Hashed(source, WeightsHasher())
        model = merged(hashed, [(opened, strength)], dtype=dtype)
        base_role = Provenance.from_metadata(source.metadata).role
        metadata = {key: value for key, value in model.metadata.items() if key not in _STALE}
        with StreamWriter(out, list(model.tensors.values()), metadata=metadata, force=force) as writer:
            for done, name in enumerate(model.tensors):
                _tell(progress, done, len(model.tensors), name)
                writer.write(name, model.load(name))
            base_hash = hashed.hasher.hexdigest()
            if base_role is not Role.RESIDUAL:
                check_base_hash(base_hash, opened, source.label)
                writer.metadata.update(Provenance(base_hash=base_hash, base_name=source.label).to_metadata())
            _tell(progress, len(model.tensors), len(model.tensors), "")
    return RebuildReport(
        path=out,
        hash=writer.hash,
        base_hash=base_hash,
        original_hash=Provenance.from_metadata(opened.metadata).base_hash,
        changed_tensors=writer.differing(hashed.hasher),
        tensors=len(model.tensors),
        warnings=opened.warnings,
    )


@dataclass(frozen=True)
class _Hashed:
    """A source whose numbers are hashed while they pass; every tensor is loaded once."""

    source: WeightSource
    hasher: WeightsHasher

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.source.metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    @property
    def label(self) -> str:
        return self.source.label

    def load(self, name: str) -> Tensor:
        tensor = self.source.load(name)
        self.hasher.add(name, tensor)
        return tensor


def export_adapter(
    tuned: Path,
    base: Path,
    out: Path,
    *,
    rank: int | None = None,
    store: torch.dtype = torch.float16,
    form: ExportForm = "lora",
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a tuned adapter in a form that other programs load.

    lora: a plain LoRA for the original model and its relatives, of rank 2r or of the given `rank`.
    principal: the tuned factors, which take the principal's place beside the residual.
    Progress counts layers; only the names and shapes of `base` are read.
    """
    with (
        open_checkpoint(base) as source,
        open_adapter(tuned, catalogue := build_catalogue(source, all_layers=True)) as opened,
    ):
        _refuse_inputs(out, source, opened)
        if not isinstance(opened, TunedAdapter):
            raise InputError(
                f"{opened.label} is no tuned adapter: it is a LoRA already",
                hint="pass the file that `train` wrote",
            )
        if form == "principal":
            _check_whole_principal(opened, catalogue, rank)
        layers = [catalogue.by_name[name] for name in opened.layers]
        # the sizes must be known before the first tensor is written, so every layer is read twice
        ranks = {layer.name: _form_rank(opened, layer.name, rank, form) for layer in layers}
        made_from = Provenance.from_metadata(opened.metadata)
        role = Role.LORA if form == "lora" else Role.PRINCIPAL
        provenance = replace(made_from, role=role, version=spectune_version())
        reports: list[ExportedLayer] = []
        with AdapterWriter(out, layers, ranks, dtype=store, provenance=provenance, force=force) as writer:
            for done, layer in enumerate(layers):
                _tell(progress, done, len(layers), layer.name)
                delta = opened.layers[layer.name]
                if form == "lora":
                    exported = export_layer(delta, rank=rank, store=store, name=layer.name)
                else:
                    exported = tuned_principal(delta, store=store, name=layer.name)
                writer.write(layer, exported.low_rank)
                reports.append(exported.report)
            _tell(progress, len(layers), len(layers), "")
        return ExportReport(path=out, hash=writer.hash, layers=tuple(reports))


def _check_whole_principal(tuned: TunedAdapter, catalogue: Catalogue, rank: int | None) -> None:
    """Raise InputError unless the tuned factors can take the place of all of a residual's principal."""
    if rank is not None:
        raise InputError("a tuned principal keeps its rank", hint="leave out --rank, or export a plain LoRA")
    if Provenance.from_metadata(tuned.metadata).principal_hash is None:
        raise InputError(
            f"{tuned.label} was not trained from the principal of a residual: there is none that it fits",
            hint=_PLAIN_LORA,
        )
    wanted = [layer.name for layer in catalogue if layer.default]
    missing = [name for name in wanted if name not in tuned.layers]
    if missing:
        raise InputError(
            f"{tuned.label} lacks {len(missing)} of {len(wanted)} layers of a principal: {some_of(missing)}",
            hint=_PLAIN_LORA,
        )


def _refuse_inputs(out: Path, base: Checkpoint, adapter: Adapter | TunedAdapter) -> None:
    assert adapter.file is not None
    refuse_inputs(out, [*base.paths, *adapter.file.paths])


def _form_rank(tuned: TunedAdapter, name: str, rank: int | None, form: ExportForm) -> int:
    delta = tuned.layers[name]
    return delta.frame.rank if form == "principal" else exported_rank(delta, rank)


def verify_files(
    model: Path, residual: Path, principal: Path, *, progress: Progress | None = None
) -> VerifyReport:
    """Compare `model` with what `residual` and `principal` make together. Progress counts tensors."""
    with (
        open_checkpoint(model) as source,
        open_checkpoint(residual) as rest,
        open_adapter(principal, build_catalogue(source, all_layers=True)) as opened,
    ):
        if not isinstance(opened, Adapter):
            raise InputError(
                f"{opened.label} is a tuned adapter: expected a principal",
                hint="pass the principal that `split` wrote",
            )
        return verify(source, rest, opened, progress=progress)


def _refuse_parts(base: WeightSource) -> None:
    role = Provenance.from_metadata(base.metadata).role
    if role not in (None, Role.MODEL):
        raise InputError(f"{base.label} is a {role}: expected a whole model", hint="split the original model")


def _origin(base: Checkpoint) -> Provenance:
    """What every file that is made from `base` says about it."""
    return replace(
        Provenance.from_metadata(base.metadata),
        version=spectune_version(),
        base_name=base.label,
        principal_hash=None,
        prediction=declared_prediction(base),
    )


def _tell(progress: Progress | None, done: int, total: int, name: str) -> None:
    if progress is not None:
        progress(done, total, name)
