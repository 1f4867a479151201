"""Export the difference of two checkpoints as a LoRA: the best factors of tuned - original."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spectune.adapters.adapter import AnyAdapter, TunedAdapter
from spectune.adapters.reader import open_any_adapter
from spectune.adapters.spellings import parse_spelling
from spectune.adapters.writer import AdapterHeader, AdapterWriter, check_adapter_name
from spectune.checkpoints.open import open_checkpoint
from spectune.core.linalg import norm
from spectune.core.lora import Exported, ExportedLayer
from spectune.core.low_rank import LowRank, Product, to_matrix
from spectune.core.rounding import check_dtype
from spectune.core.spectrum import squares_at
from spectune.core.split import split_weight
from spectune.errors import InputError, some_of
from spectune.files.dtypes import parse_dtype
from spectune.files.pipeline import report_progress, run_pipeline
from spectune.files.provenance import Provenance, Role, spectune_version
from spectune.files.reader import Checkpoint
from spectune.files.source import TensorInfo, WeightSource, declared_prediction
from spectune.files.weights_hash import WeightsHasher
from spectune.files.writer import check_target
from spectune.model.device import parse_device
from spectune.ops.export.report import ExportReport
from spectune.ops.options.adapter_files import ExportOptions
from spectune.ops.shared import is_checkpoint, refuse_overwriting
from spectune.pairs.merged import Merged, merged
from spectune.pairs.rank_plan import choose_ranks, rank_request
from spectune.pairs.rules import check_base_hash, check_whole_model
from spectune.sdxl.inference import infer_parts
from spectune.sdxl.layers import Catalogue, Layer, build_catalogue
from spectune.sdxl.layout import PART_ROOTS, VAE_ROOT, PartName, part_of
from spectune.sdxl.selection import select_layers

_COMPARED: tuple[PartName, ...] = ("unet", "te1", "te2")
# constants, not trained weights
_NO_WEIGHTS = ("position_ids", "logit_scale")
HELD_RANKS = (4, 16, 64, 128)  # at which a report gives the share of a change


@dataclass(frozen=True)
class Difference:
    """A source of the tensors tuned - original, in float32."""

    tuned: WeightSource
    original: WeightSource
    hasher: WeightsHasher  # hashes each tensor of the original when it is loaded
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def of(cls, tuned: WeightSource, original: WeightSource) -> Difference:
        tensors = {
            name: replace(info, dtype=torch.float32) if info.dtype.is_floating_point else info
            for name, info in original.tensors.items()
        }
        return cls(tuned, original, WeightsHasher(), tensors)

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.tuned.metadata

    @property
    def provenance(self) -> Provenance:
        return self.tuned.provenance

    @property
    def label(self) -> str:
        return f"{self.tuned.label} - {self.original.label}"

    def load(self, name: str) -> Tensor:
        original = self.original.load(name)
        self.hasher.add(name, original)
        # In place: one float32 copy instead of three. torch cannot subtract 8-bit floats from float32.
        subtrahend = original.float() if original.dtype.itemsize == 1 else original
        return self.tuned.load(name).to(torch.float32, copy=True).sub_(subtrahend)


def export_difference(options: ExportOptions, base: Path) -> ExportReport:
    """Write the LoRA of the requested ranks that is closest to the difference `tuned` - `base`.

    `tuned` is a checkpoint, or an adapter that is more than a product of two factors per layer, such as a
    full fine-tuning. The default rank is 64 for every layer. Values are not clamped. The report contains the
    error of each layer, the changed tensors that a LoRA cannot hold, and the unchanged layers. Progress
    counts tensors.

    Raises InputError if the checkpoints do not have the same tensors.
    """
    tuned, out, force, progress = options.tuned, options.out, options.force, options.progress
    ranks = rank_request(options.rank, options.conv_rank, options.energy, options.size)
    store, device = parse_dtype(options.dtype), parse_device(options.device)
    check_adapter_name(out)
    check_target(out, 0, force=force)
    with open_checkpoint(base) as before, _open_tuned(tuned, before) as opened:
        after = opened.source
        refuse_overwriting(out, [opened.file, before])
        for source in (after, before):
            check_whole_model(source)
        compared, warnings = compared_tensors(after, before)
        compared = [name for name in compared if opened.touched is None or name in opened.touched]
        difference = Difference.of(after, before)
        catalogue = build_catalogue(before, all_layers=True)
        both = tuple(layer for layer in catalogue if layer.tensor in after.tensors)
        if not both:
            infer_parts(after)  # says what the file is instead
        if opened.layers is None or options.layers is not None:
            chosen = select_layers(replace(catalogue, layers=both), options.layers or ("default",))
        else:
            chosen = tuple(layer for layer in both if layer.name in opened.layers)
        for layer in chosen:
            for source in (after, before):
                check_dtype(source.tensors[layer.tensor].dtype, f"layer {layer.name} of {source.label}")
        plan = choose_ranks(difference, chosen, ranks, store=store, progress=progress)
        kept = Catalogue(chosen, catalogue.unet)
        # Layers that `layers` excludes do not count as lost.
        excluded = {layer.tensor for layer in catalogue if layer.default} - kept.by_tensor.keys()
        compared = [name for name in compared if name not in excluded]
        factors: dict[str, LowRank] = {}
        factorizer = _DifferenceFactorizer(difference, kept, plan.ranks, store, device, factors)
        factorizer.measures_ranks = opened.measures_ranks
        done = 0

        def consume(name: str, result: _FactoredTensor) -> None:
            nonlocal done
            factorizer.take(name, result)
            report_progress(progress, done, len(compared), name)
            done += 1

        run_pipeline(
            compared, factorizer.work, consume, size=lambda name: 3 * difference.tensors[name].nbytes
        )
        # The factors stay in memory: they are small, and only now is it known which layers changed.
        changed = [layer for layer in kept if layer.name in factors]
        if not changed:
            raise InputError(
                f"no layer of {after.label} differs from {before.label}",
                hint="pass the tuned model as `tuned` and the model it was made from as `base`",
            )
        base_hash = factorizer.base_hash(before)
        opened.check_base(base_hash, before.label)
        provenance = replace(
            after.provenance,
            role=Role.LORA,
            version=spectune_version(),
            base_hash=base_hash,
            base_name=before.label,
            principal_hash=None,
            prediction=declared_prediction(after),
        )
        true_ranks = {layer.name: factors[layer.name].rank for layer in changed}
        header = AdapterHeader(changed, true_ranks, store, provenance, parse_spelling(options.keys))
        with AdapterWriter(out, header, force=force) as writer:
            for layer in changed:
                writer.write_layer(layer, factors[layer.name])
        report_progress(progress, done, done, "")
    return ExportReport(
        path=out,
        hash=writer.hash,
        layers=tuple(factorizer.reports[layer.name] for layer in changed),
        left_out=tuple(factorizer.left_out),
        outside=factorizer.outside,
        held=factorizer.held,
        warnings=(*opened.warnings, *warnings, *prediction_warning(after, before)),
    )


@dataclass(frozen=True)
class _Tuned:
    """The tuned model: a checkpoint, or the original with an adapter."""

    source: WeightSource
    file: Checkpoint | AnyAdapter
    touched: Collection[str] | None = None  # tensors that can differ; None: all
    layers: Collection[str] | None = None  # names of the layers to export; None: `layers` selects them
    warnings: tuple[str, ...] = ()
    measures_ranks: bool = False  # whether to compute the share of the change that each rank holds

    def check_base(self, base_hash: str, label: str) -> None:
        """Raise PairingError if the file is a tuned adapter of another base."""
        if isinstance(self.file, TunedAdapter):
            check_base_hash(base_hash, self.file, label)


@contextmanager
def _open_tuned(path: Path, original: WeightSource) -> Generator[_Tuned]:
    if is_checkpoint(path):
        with open_checkpoint(path) as file:
            yield _Tuned(file, file)
        return
    with open_any_adapter(path, build_catalogue(original, all_layers=True)) as adapter:
        # float32: the change of a layer is often smaller than the rounding of its weight
        model = merged(original, [(adapter, 1.0)], dtype=torch.float32)
        assert isinstance(model, Merged)
        warnings = (*adapter.warnings, *model.warnings)
        if isinstance(adapter, TunedAdapter):
            yield _Tuned(model, adapter, model.touched, None, warnings, measures_ranks=True)
        else:
            yield _Tuned(model, adapter, model.touched, frozenset(adapter.layers), warnings)


@dataclass(frozen=True)
class _FactoredTensor:
    """The factors of one tensor of the difference."""

    layers: tuple[
        tuple[Layer, Exported | ExportedLayer], ...
    ]  # factors, or the report of a layer that is left out
    outside: float  # norm of the change outside of all layers
    held: Tensor | None = None  # squared norms of the change of these layers at HELD_RANKS


class _DifferenceFactorizer:
    """Computes the LoRA of the difference of two checkpoints, tensor by tensor.

    `factors` gets the factors of each layer; `reports` and `left_out` describe the layers.
    """

    def __init__(
        self,
        difference: Difference,
        catalogue: Catalogue,
        ranks: Mapping[str, int],
        store: torch.dtype,
        device: torch.device | str,
        factors: dict[str, LowRank],
    ) -> None:
        self.difference, self.catalogue, self.ranks = difference, catalogue, ranks
        self.store, self.device, self.factors = store, device, factors
        self.reports: dict[str, ExportedLayer] = {}
        self.left_out: list[ExportedLayer] = []
        self.outside: dict[str, float] = {}
        self.measures_ranks = False
        self._held = torch.zeros(len(HELD_RANKS), dtype=torch.float64)

    def work(self, name: str) -> _FactoredTensor:
        change = self.difference.load(name)
        layers = self.catalogue.by_tensor.get(name, ())
        held = None
        if self.measures_ranks and layers:
            held = torch.stack([squares_at(change[layer.row_slice], HELD_RANKS) for layer in layers]).sum(0)
        exported = tuple((layer, self._factored(layer, change[layer.row_slice])) for layer in layers)
        if not layers:
            return _FactoredTensor((), norm(change))
        rows = sum(layer.out_features for layer in layers)
        if rows == change.shape[0]:
            return _FactoredTensor(exported, 0.0, held)
        rest = torch.ones(change.shape[0], dtype=torch.bool)
        for layer in layers:
            rest[layer.row_slice] = False
        return _FactoredTensor(exported, norm(change[rest]), held)

    def _factored(self, layer: Layer, change: Tensor) -> Exported | ExportedLayer:
        """Return the factors of the change, or the report of a layer that is left out."""
        if not bool(change.any()):
            return ExportedLayer(layer.name, 0, layer.full_rank, 0.0, 0.0)
        rank = self.ranks.get(layer.name, 0)
        if not rank:
            return ExportedLayer(layer.name, 0, layer.full_rank, norm(change), 1.0)
        split = split_weight(change, rank=rank, store=self.store, device=self.device, name=layer.name)
        error = to_matrix(change)  # `change` is not used again: subtract in place
        for tile, numbers in Product(split.low_rank, exact=False).tiles():
            error[tile] -= numbers
        size = split.report.norm
        report = ExportedLayer(
            layer.name, split.report.rank, layer.full_rank, size, norm(error) / size if size else 0.0
        )
        return Exported(split.low_rank, report)

    def take(self, name: str, result: _FactoredTensor) -> None:
        for layer, exported in result.layers:
            if isinstance(exported, ExportedLayer):
                self.left_out.append(exported)
            else:
                self.factors[layer.name] = exported.low_rank
                self.reports[layer.name] = exported.report
        if result.outside:
            self.outside[name] = result.outside
        if result.held is not None:
            self._held += result.held

    @property
    def held(self) -> dict[int, float]:
        """The share of the squared change, of layers and other tensors, that each of HELD_RANKS holds."""
        layers = (*self.reports.values(), *self.left_out)
        total = sum(size**2 for size in (*(layer.norm for layer in layers), *self.outside.values()))
        if not (self.measures_ranks and total):
            return {}
        return {rank: float(square) / total for rank, square in zip(HELD_RANKS, self._held, strict=True)}

    def base_hash(self, before: WeightSource) -> str:
        """Return the weights hash of the original, including the tensors that were not compared."""
        for name in before.tensors:
            if name not in self.difference.hasher:
                self.difference.hasher.add(name, before.load(name))
        return self.difference.hasher.hexdigest()


def compared_tensors(after: WeightSource, before: WeightSource) -> tuple[list[str], tuple[str, ...]]:
    """Return the tensors to compare, and warnings. A text encoder that one file lacks is not compared.

    Raises InputError if the UNets or text encoders do not have the same tensors.
    """
    parts = [(source, _parts_of(source)) for source in (after, before)]
    both = tuple(PART_ROOTS[part] for part in _COMPARED if all(part in found for _, found in parts))
    ours, theirs = (
        [name for name, info in source.tensors.items() if name.startswith(both) and _is_weight(info)]
        for source in (before, after)
    )
    missing = [name for name in ours if name not in after.tensors]
    extra = [name for name in theirs if name not in before.tensors]
    for absent, one, other in ((missing, before, after), (extra, after, before)):
        if absent:
            raise InputError(
                f"{len(absent)} tensors of {one.label} are not in {other.label}: {some_of(absent)}",
                hint="pass two checkpoints of the same architecture",
            )
    misfits = [name for name in ours if after.tensors[name].shape != before.tensors[name].shape]
    if misfits:
        name = misfits[0]
        raise InputError(
            f"{len(misfits)} tensors of {after.label} have another shape than in {before.label}: {name} is "
            f"{after.tensors[name].shape}, expected {before.tensors[name].shape}",
            hint="pass two checkpoints of the same size",
        )
    warnings = [
        f"{part} was not compared: {source.label} has none"
        for part in _COMPARED
        for source, found in parts
        if part not in found and any(part in other for _, other in parts)
    ]
    return ours, (*warnings, *_vae_warning(after, before))


def _parts_of(source: WeightSource) -> frozenset[str]:
    return frozenset(part_of(name) for name in source.tensors)


def _vae_warning(after: WeightSource, before: WeightSource) -> tuple[str, ...]:
    """Return a warning if the tuned checkpoint brings another VAE than that of the original."""
    ours, theirs = (
        [name for name, info in source.tensors.items() if name.startswith(VAE_ROOT) and _is_weight(info)]
        for source in (after, before)
    )
    use = f"use the VAE of {after.label} together with the LoRA"
    if not ours:
        return ()
    if not theirs:
        return (f"{after.label} has a VAE, {before.label} has none, and a LoRA does not hold it: {use}",)
    names = dict.fromkeys([*ours, *theirs])
    different = [name for name in names if not _same_bits(after, before, name)]
    if not different:
        return ()
    return (f"{len(different)} tensors of the VAEs differ, and a LoRA does not hold them: {use}",)


def _is_weight(info: TensorInfo) -> bool:
    return info.dtype.is_floating_point and bool(info.numel) and not info.name.endswith(_NO_WEIGHTS)


def _same_bits(after: WeightSource, before: WeightSource, name: str) -> bool:
    shapes = [source.tensors[name].shape for source in (after, before) if name in source.tensors]
    if len(shapes) < 2 or shapes[0] != shapes[1]:
        return False
    return torch.equal(after.load(name).float(), before.load(name).float())


def prediction_warning(after: WeightSource, before: WeightSource) -> tuple[str, ...]:
    """Return a warning if the two checkpoints have different prediction types."""
    tuned, original = declared_prediction(after) or "eps", declared_prediction(before) or "eps"
    if tuned == original:
        return ()
    return (
        f"{after.label} predicts {tuned}, {before.label} predicts {original}: with the LoRA, set the sampler "
        f"to {tuned}",
    )
