"""The operations on whole files: what the commands split, rebuild, export and verify do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from spectune.errors import InputError, some_of
from spectune.factor.report import Agreement, LayerReport, total_energy, total_share
from spectune.factor.rounding import check_dtype
from spectune.factor.svd import Method
from spectune.rebuild.exceptions import HEADER_BYTES, exceptions_name, to_bytes
from spectune.rebuild.export import ExportedLayer, export_layer, exported_rank, total_error, tuned_principal
from spectune.rebuild.merge import Merged, Restored, merged
from spectune.rebuild.pairing import LAYER_COUNT_KEY, base_dtypes_metadata, check_base_hash
from spectune.rebuild.pipeline import Progress, stream, tell
from spectune.rebuild.ranks import FixedRank, RankRequest, choose_ranks
from spectune.rebuild.splitting import SplitPlan, SplitTensor, split_tensor
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
from spectune.weights.quantised import check_not_quantised
from spectune.weights.reader import (
    INDEX_SUFFIX,
    MODEL_INDEX,
    Checkpoint,
    TensorInfo,
    WeightSource,
    open_checkpoint,
)
from spectune.weights.selection import select_layers
from spectune.weights.targets import TensorWriter, open_writer
from spectune.weights.together import Together
from spectune.weights.writer import RESERVE_BYTES, StreamWriter, check_target, refuse_inputs

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
    label: str  # what the ranks are, as in the file's name: r64
    layers: tuple[LayerReport, ...]
    agreements: Mapping[str, Agreement]  # by tensor, the factored ones; empty without a residual
    exceptions: int = 0  # numbers that the residual's file keeps by themselves

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
    def excess(self) -> float:
        """The largest estimated (norm of what is left / smallest possible) - 1 of a layer."""
        return max((layer.excess for layer in self.layers), default=0.0)

    @property
    def capped(self) -> tuple[LayerReport, ...]:
        """Layers that are no larger than their rank, so that all of them is in the principal."""
        return tuple(layer for layer in self.layers if layer.capped)


@dataclass(frozen=True)
class RebuildReport:
    """What `rebuild` wrote; hashes are of the numbers, not of the files."""

    path: Path
    hash: str
    base_hash: str | None  # of the file that was built upon; None for a residual
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


def principal_name(stem: str, label: str) -> str:
    """The file name of a principal adapter: `base.principal-r64.safetensors`."""
    return f"{stem}.principal-{label}.safetensors"


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
    ranks: RankRequest | None = None,
    store: torch.dtype = torch.float16,
    residual_dtype: torch.dtype | None = None,
    with_residual: bool = True,
    layers: Sequence[str] = ("default",),
    method: Method = "auto",
    device: torch.device | str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> SplitReport:
    """Write the principal adapter of `model` and, unless told otherwise, its residual model into `folder`.

    `ranks` is 64 for every layer if not given; `layers` are words and patterns that `select_layers` knows.
    `residual_dtype` None keeps each tensor's own type (float16 for fp8); a wider one makes the pair exact.
    Both files appear together when they are complete. Progress counts tensors. Raises InputError when `model`
    is itself only a part of a model.
    """
    with open_checkpoint(model) as base:
        _refuse_parts(base)
        check_not_quantised(base)
        chosen = select_layers(build_catalogue(base, all_layers=True), layers)
        for layer in chosen:
            check_dtype(base.tensors[layer.tensor].dtype, f"layer {layer.name} of {base.label}")
        rank_plan = choose_ranks(base, chosen, ranks or FixedRank(64), store=store, progress=progress)
        plan = SplitPlan(rank_plan.ranks, store, residual_dtype, method, device)
        catalogue = Catalogue(
            tuple(layer for layer in chosen if plan.ranks.get(layer.name, 0)), build_catalogue(base).unet
        )
        folder.mkdir(parents=True, exist_ok=True)
        stem = checkpoint_stem(model)
        principal = folder / principal_name(stem, rank_plan.label)
        residual = folder / residual_name(stem) if with_residual else None
        origin = _origin(base)
        with Together(principal) as together:
            # both at once: a pair that is half old and half new fits nobody
            for path in filter(None, (principal, residual)):
                check_target(path, 0, force=force)
            with _residual_writer(residual, base, catalogue, plan, force=force) as residual_writer:
                with AdapterWriter(
                    principal,
                    catalogue.layers,
                    plan.ranks,
                    dtype=store,
                    provenance=replace(origin, role=Role.PRINCIPAL),
                    force=force,
                    hold=True,
                ) as writer:
                    together.hold(writer)
                    passage = _Passage(base, catalogue, plan, writer, residual_writer, progress)
                    passage.run()
                    origin = replace(origin, base_hash=passage.hasher.hexdigest())
                    writer.metadata.update(replace(origin, role=Role.PRINCIPAL).to_metadata())
                if residual_writer is not None:
                    together.hold(residual_writer)
                    made_from = replace(origin, role=Role.RESIDUAL, principal_hash=writer.hash)
                    residual_writer.metadata.update(made_from.to_metadata())
    assert origin.base_hash is not None
    return SplitReport(
        principal=principal,
        residual=residual,
        base_hash=origin.base_hash,
        principal_hash=writer.hash,
        label=rank_plan.label,
        layers=tuple(passage.reports),
        agreements=passage.agreements,
        exceptions=passage.exceptions,
    )


class _Passage:
    """All tensors of a checkpoint on their way into the files of the split."""

    def __init__(
        self,
        base: WeightSource,
        catalogue: Catalogue,
        plan: SplitPlan,
        writer: AdapterWriter,
        residual_writer: StreamWriter | None,
        progress: Progress | None,
    ) -> None:
        self.base, self.catalogue, self.plan = base, catalogue, plan
        self.writer, self.residual_writer, self.progress = writer, residual_writer, progress
        self.hasher = WeightsHasher()
        self.reports: list[LayerReport] = []
        self.agreements: dict[str, Agreement] = {}
        self.exceptions = 0
        self._done = 0

    def run(self) -> None:
        stream(list(self.base.tensors.values()), self._split, self._write, size=lambda info: info.nbytes)
        tell(self.progress, self._done, self._done, "")

    def _split(self, info: TensorInfo) -> SplitTensor:
        tensor = self.base.load(info.name)
        self.hasher.add(info.name, tensor)
        layers = self.catalogue.by_tensor.get(info.name)
        if layers is None:
            return SplitTensor(tensor, (), (), None)
        return split_tensor(tensor, layers, self.plan, with_residual=self.residual_writer is not None)

    def _write(self, info: TensorInfo, split: SplitTensor) -> None:
        for layer, low_rank in split.low_ranks:
            self.writer.write(layer, low_rank)
        self.reports += split.reports
        if split.agreement is not None:
            self.agreements[info.name] = split.agreement
        if self.residual_writer is not None and split.residual is not None:
            self.residual_writer.write(info.name, split.residual)
            if split.exceptions:
                self.residual_writer.append(exceptions_name(info.name), to_bytes(split.exceptions))
                self.exceptions += sum(len(part) for _, part in split.exceptions)
        tell(self.progress, self._done, len(self.base.tensors), info.name)
        self._done += 1


def _residual_writer(
    path: Path | None, base: WeightSource, catalogue: Catalogue, plan: SplitPlan, *, force: bool
) -> StreamWriter | nullcontext[None]:
    if path is None:
        return nullcontext()
    infos = [
        replace(info, dtype=plan.residual_of(info.dtype)) if name in catalogue.by_tensor else info
        for name, info in base.tensors.items()
    ]
    other = {info.name: base.tensors[info.name].dtype for info in infos if info != base.tensors[info.name]}
    kept = {key: value for key, value in base.metadata.items() if key not in _STALE}
    metadata = {**kept, LAYER_COUNT_KEY: str(len(catalogue)), **base_dtypes_metadata(other)}
    reserve = RESERVE_BYTES + HEADER_BYTES * len(other)
    return StreamWriter(
        path, infos, metadata=metadata, reserve_bytes=reserve, force=force, hold=True, hashed=False
    )


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
        check_not_quantised(source)
        # a residual has no hash that anything refers to; the original it gives back has
        is_residual = Provenance.from_metadata(source.metadata).role is Role.RESIDUAL
        hashed = None if is_residual else _Hashed(source, WeightsHasher())
        model = merged(hashed or source, [(opened, strength)], dtype=dtype)
        metadata = {key: value for key, value in model.metadata.items() if key not in _STALE}
        infos = list(model.tensors.values())
        with open_writer(out, infos, metadata=metadata, force=force, template=template_of(source)) as writer:
            write_all(model, writer, progress)
            base_hash = None
            if hashed is not None:
                base_hash = hashed.hasher.hexdigest()
                check_base_hash(base_hash, opened, source.label)
                writer.metadata.update(Provenance(base_hash=base_hash, base_name=source.label).to_metadata())
    return RebuildReport(
        path=out,
        hash=writer.hash,
        base_hash=base_hash,
        original_hash=Provenance.from_metadata(opened.metadata).base_hash,
        changed_tensors=_factored(model) if hashed is None else writer.differing(hashed.hasher),
        tensors=len(model.tensors),
        warnings=opened.warnings,
    )


def _factored(model: Merged | Restored) -> int:
    return len(model.principals) if isinstance(model, Restored) else len(model.changes)


def template_of(base: Checkpoint) -> Path | None:
    """The diffusers folder whose small files a new one takes over; None for a base of another kind."""
    folder = base.path.parent if base.path.name == MODEL_INDEX else base.path
    return folder if (folder / MODEL_INDEX).is_file() else None


def write_all(model: WeightSource, writer: TensorWriter, progress: Progress | None) -> None:
    """Compute and write every tensor of a model."""
    names, done = list(model.tensors), 0

    def write(name: str, tensor: Tensor) -> None:
        nonlocal done
        writer.write(name, tensor)
        tell(progress, done, len(names), name)
        done += 1

    def computed(name: str) -> Tensor:
        tensor = model.load(name)
        writer.hash_ahead(name, tensor)
        return tensor

    stream(names, computed, write, size=lambda name: model.tensors[name].nbytes)
    tell(progress, done, len(names), "")


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
                tell(progress, done, len(layers), layer.name)
                delta = opened.layers[layer.name]
                if form == "lora":
                    exported = export_layer(delta, rank=rank, store=store, name=layer.name)
                else:
                    exported = tuned_principal(delta, store=store, name=layer.name)
                writer.write(layer, exported.low_rank)
                reports.append(exported.report)
            tell(progress, len(layers), len(layers), "")
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
