"""Split a checkpoint into a principal adapter and a residual model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from spectune.adapters.writer import AdapterHeader, AdapterWriter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.agreement import Agreement, total_share
from spectune.core.rounding import check_dtype
from spectune.core.split import LayerReport, total_energy
from spectune.errors import check_all
from spectune.files.atomic_group import AtomicGroup
from spectune.files.dtypes import SAFETENSORS_NAMES, parse_dtype, parse_residual_dtype
from spectune.files.pipeline import Progress, report_progress, run_pipeline
from spectune.files.provenance import Role
from spectune.files.reader import INDEX_SUFFIX
from spectune.files.rename import made_folder
from spectune.files.source import TensorInfo, WeightSource
from spectune.files.weights_hash import WeightsHasher
from spectune.files.writer import RESERVE_BYTES, StreamWriter, check_target
from spectune.model.device import build_warning, parse_device
from spectune.model.memory_errors import CARD_REMEDIES, explained_memory_errors
from spectune.operation import operation
from spectune.ops.options.model_files import SplitOptions
from spectune.ops.shared import STALE, origin_of
from spectune.pairs.rank_plan import RankPlan, choose_ranks, rank_request
from spectune.pairs.residual_file import (
    HEADER_BYTES,
    LAYER_COUNT_KEY,
    PRINCIPAL_DTYPE_KEY,
    base_dtypes_metadata,
    exceptions_name,
    to_bytes,
)
from spectune.pairs.rules import check_whole_model
from spectune.pairs.split_tensor import SplitPlan, SplitTensor, split_tensor
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue
from spectune.sdxl.selection import select_layers

# More workers than CPU threads, because some wait for the GPU. The GPU holds the matrices of all workers.
GPU_WORKERS = 2


@dataclass(frozen=True)
class SplitReport:
    """The files that `split` wrote, and how exactly they restore the checkpoint."""

    principal: Path
    residual: Path | None
    base_hash: str
    principal_hash: str
    label: str  # the ranks, as in the file name: r64
    layers: tuple[LayerReport, ...]
    agreements: Mapping[str, Agreement]  # of the restored factored tensors, by name; empty without a residual
    exceptions: int = 0  # weights that the residual file lists with their exact values

    @property
    def energy(self) -> float:
        """Return the principal's share of the squared norm of all factored weights, 0..1."""
        return total_energy(self.layers)

    @property
    def share(self) -> float:
        """Return the share of factored weights that residual + principal restore bit for bit, 0..1."""
        return total_share(self.agreements.values())

    @property
    def exact(self) -> bool:
        return all(agreement.exact for agreement in self.agreements.values())

    @property
    def excess(self) -> float:
        """Return the largest estimate of (residual norm / smallest possible residual norm) - 1 of a layer."""
        return max((layer.excess for layer in self.layers), default=0.0)

    @property
    def zero(self) -> tuple[LayerReport, ...]:
        """Return the layers whose weights are all zero: with zero factors, they have no gradients."""
        return tuple(layer for layer in self.layers if layer.norm == 0)

    @property
    def capped(self) -> tuple[LayerReport, ...]:
        """Return the layers with a full rank up to the requested one: the principal holds them completely."""
        return tuple(layer for layer in self.layers if layer.capped)


def principal_name(stem: str, label: str) -> str:
    """Return the file name of a principal adapter: `base.principal-r64.safetensors`."""
    return f"{stem}.principal-{label}.safetensors"


def residual_name(stem: str) -> str:
    """Return the file name of a residual model: `base.residual.safetensors`."""
    return f"{stem}.residual.safetensors"


def checkpoint_stem(path: Path) -> str:
    """Return the name of a checkpoint without its suffixes, or the name of a folder."""
    return path.resolve().name.removesuffix(INDEX_SUFFIX).removesuffix(".safetensors")


@dataclass(frozen=True)
class SplitForecast:
    """The files that `split` would write."""

    principal: Path
    residual: Path | None
    ranks: RankPlan


def plan_split(options: SplitOptions) -> SplitForecast:
    """Return the files and ranks of a split without writing. `energy` and `budget` read all weights."""
    with open_checkpoint(options.model) as base:
        chosen = select_layers(build_catalogue(base, all_layers=True), options.layers)
        ranks = _ranks(options, base, chosen)
    principal, residual = _targets(options, ranks)
    return SplitForecast(principal, residual, ranks)


def _ranks(options: SplitOptions, base: WeightSource, layers: Sequence[Layer]) -> RankPlan:
    request = rank_request(options.rank, options.conv_rank, options.energy, options.budget)
    store = parse_dtype(options.dtype)
    return choose_ranks(base, layers, request, store=store, progress=options.progress)


def _targets(options: SplitOptions, ranks: RankPlan) -> tuple[Path, Path | None]:
    stem = checkpoint_stem(options.model)
    residual = options.out / residual_name(stem) if options.with_residual else None
    return options.out / principal_name(stem, ranks.label), residual


@operation(SplitOptions)
def split(options: SplitOptions) -> SplitReport:
    """Write the principal adapter and the residual model of a checkpoint.

    Both files get their final names when both are complete. Progress counts tensors; `notify` is called
    before the work begins if torch cannot use the GPU of this machine.

    Raises InputError if `model` is not a complete SDXL checkpoint.
    """
    force = options.force
    device = parse_device(options.device)
    _warn_of_unused_card(options)
    with open_checkpoint(options.model) as base:
        check_whole_model(base)
        chosen = select_layers(build_catalogue(base, all_layers=True), options.layers)
        check_all(
            chosen,
            lambda layer: check_dtype(
                base.tensors[layer.tensor].dtype, f"layer {layer.name} of {base.label}"
            ),
        )
        rank_plan = _ranks(options, base, chosen)
        residual_dtype = (
            None if options.residual_dtype is None else parse_residual_dtype(options.residual_dtype)
        )
        plan = SplitPlan(rank_plan.ranks, parse_dtype(options.dtype), residual_dtype, options.svd, device)
        catalogue = Catalogue(
            tuple(layer for layer in chosen if plan.ranks.get(layer.name, 0)), build_catalogue(base).unet
        )
        principal, residual = _targets(options, rank_plan)
        origin = origin_of(base)
        with made_folder(options.out), AtomicGroup(principal) as group:
            # Check both first: a new principal with an old residual would not be a pair.
            for path in filter(None, (principal, residual)):
                check_target(path, 0, force=force)
            with _residual_writer(residual, base, catalogue, plan, force=force) as residual_writer:
                with AdapterWriter(
                    principal,
                    AdapterHeader(
                        catalogue.layers, plan.ranks, plan.store, replace(origin, role=Role.PRINCIPAL)
                    ),
                    force=force,
                    hold=True,
                ) as writer:
                    group.add(writer)
                    splitter = _TensorSplitter(
                        base, catalogue, plan, writer, residual_writer, options.progress
                    )
                    with explained_memory_errors(lambda: CARD_REMEDIES):
                        splitter.run()
                    origin = replace(origin, base_hash=splitter.hasher.hexdigest())
                    writer.metadata.update(replace(origin, role=Role.PRINCIPAL).to_metadata())
                if residual_writer is not None:
                    group.add(residual_writer)
                    made_from = replace(origin, role=Role.RESIDUAL, principal_hash=writer.hash)
                    residual_writer.metadata.update(made_from.to_metadata())
    assert origin.base_hash is not None
    return SplitReport(
        principal=principal,
        residual=residual,
        base_hash=origin.base_hash,
        principal_hash=writer.hash,
        label=rank_plan.label,
        layers=tuple(splitter.reports),
        agreements=splitter.agreements,
        exceptions=splitter.exceptions,
    )


def _warn_of_unused_card(options: SplitOptions) -> None:
    warning = build_warning() if options.device == "auto" else None
    if warning is not None and options.notify is not None:
        options.notify(warning)


class _TensorSplitter:
    """Splits all tensors of a checkpoint and writes both files."""

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
        on_cpu = str(self.plan.device) == "cpu"
        run_pipeline(
            list(self.base.tensors.values()),
            self._split,
            self._write,
            size=lambda info: info.nbytes,
            waiting_workers=0 if on_cpu else GPU_WORKERS,
        )
        report_progress(self.progress, self._done, self._done, "")

    def _split(self, info: TensorInfo) -> SplitTensor:
        tensor = self.base.load(info.name)
        self.hasher.add(info.name, tensor)
        layers = self.catalogue.by_tensor.get(info.name)
        if layers is None:
            return SplitTensor(tensor, (), (), None)
        return split_tensor(tensor, layers, self.plan, with_residual=self.residual_writer is not None)

    def _write(self, info: TensorInfo, split: SplitTensor) -> None:
        for layer, low_rank in split.low_ranks:
            self.writer.write_layer(layer, low_rank)
        self.reports += split.reports
        if split.agreement is not None:
            self.agreements[info.name] = split.agreement
        if self.residual_writer is not None and split.residual is not None:
            self.residual_writer.write(info.name, split.residual)
            if split.exceptions:
                self.residual_writer.append(exceptions_name(info.name), to_bytes(split.exceptions))
                self.exceptions += sum(len(part) for _, part in split.exceptions)
        report_progress(self.progress, self._done, len(self.base.tensors), info.name)
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
    copied = {key: value for key, value in base.metadata.items() if key not in STALE}
    metadata = {
        **copied,
        LAYER_COUNT_KEY: str(len(catalogue)),
        PRINCIPAL_DTYPE_KEY: SAFETENSORS_NAMES[plan.store],
        **base_dtypes_metadata(other),
    }
    reserve = RESERVE_BYTES + HEADER_BYTES * len(other)
    return StreamWriter(
        path, infos, metadata=metadata, reserve_bytes=reserve, force=force, hold=True, hashed=False
    )
