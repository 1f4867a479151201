"""Measure the singular spectra of a checkpoint by layer, block and part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from spectune.core.low_rank import to_matrix
from spectune.core.rank import rank_for_energy
from spectune.core.rounding import check_dtype
from spectune.core.spectrum import decay_exponent, energy_at, energy_curve, singular_values
from spectune.files.pipeline import Progress, report_progress, run_pipeline
from spectune.files.source import WeightSource
from spectune.sdxl.layers import RANKS, Catalogue, Layer, RankCost, rank_cost

# Two steps per octave give a smooth curve; includes the five ranks of the tables.
CURVE_RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SHOWN_ENERGY = 0.9  # `rank_90` is the rank that reaches it


@dataclass(frozen=True)
class LayerSpectrum:
    """The spectrum of one layer; energies are shares of its squared norm, 0..1."""

    name: str
    part: str
    block: str
    kind: str
    shape: tuple[int, ...]
    full_rank: int
    norm: float  # Frobenius
    largest: float  # singular value
    energies: Mapping[int, float]  # by rank, for CURVE_RANKS; 1 at and above the full rank
    rank_90: int  # number of directions that hold 90 % of the energy
    decay: float | None  # exponent a of s_i ~ i^-a, fitted to the first 256 values


@dataclass(frozen=True)
class GroupSpectrum:
    """The spectra of a part, a block or all layers; energies are shares of the sum of squared norms."""

    name: str
    part: str  # empty for all layers
    layers: int
    norm: float
    smallest_full_rank: int
    largest_full_rank: int
    energies: Mapping[int, float]  # by rank, for CURVE_RANKS
    lowest: Mapping[int, float]  # energy of the layer with the lowest one, by rank
    highest: Mapping[int, float]
    median_rank_90: float
    median_decay: float | None


@dataclass(frozen=True)
class SpectrumReport:
    """The spectra of a checkpoint; groups and layers are in the order of the network."""

    label: str
    total: GroupSpectrum
    parts: tuple[GroupSpectrum, ...]
    blocks: tuple[GroupSpectrum, ...]
    layers: tuple[LayerSpectrum, ...]
    costs: tuple[RankCost, ...]  # of principals of rank 16, 32, 64, 128 and 256

    def smaller_than(self, rank: int) -> tuple[LayerSpectrum, ...]:
        """Return the layers whose full rank is below `rank`."""
        return tuple(layer for layer in self.layers if layer.full_rank < rank)


def all_spectra(
    source: WeightSource, layers: Sequence[Layer], progress: Progress | None = None
) -> tuple[Tensor, ...]:
    """Return the singular values of every layer, in the order of `layers`: float64 (full rank), descending.

    Every tensor is read once; only a few are in memory at a time. Progress counts layers. Raises InputError
    for dtypes that weights cannot have, and for NaN and infinite values.
    """
    indices: dict[str, list[int]] = {}  # by tensor, because q, k and v may share one
    for index, layer in enumerate(layers):
        check_dtype(source.tensors[layer.tensor].dtype, f"layer {layer.name} of {source.label}")
        indices.setdefault(layer.tensor, []).append(index)
    spectra: dict[int, Tensor] = {}

    def measure(tensor_name: str) -> list[Tensor]:
        tensor = source.load(tensor_name)
        return [_values(tensor, layers[index], source.label) for index in indices[tensor_name]]

    def collect(tensor_name: str, values: list[Tensor]) -> None:
        spectra.update(zip(indices[tensor_name], values, strict=True))
        report_progress(progress, len(spectra), len(layers), tensor_name)

    run_pipeline(indices, measure, collect, size=lambda name: source.tensors[name].nbytes)
    return tuple(spectra[index] for index in range(len(layers)))


def _values(tensor: Tensor, layer: Layer, label: str) -> Tensor:
    return singular_values(to_matrix(tensor[layer.row_slice]), name=f"layer {layer.name} of {label}")


def measure_spectra(
    source: WeightSource, catalogue: Catalogue, progress: Progress | None = None
) -> SpectrumReport:
    """Measure the spectrum of every layer of `catalogue`; SDXL takes one or two minutes on two cores.

    Progress counts layers. Raises InputError like `all_spectra`.
    """
    spectra = all_spectra(source, catalogue.layers, progress)
    layers = [_measured(layer, values) for layer, values in zip(catalogue, spectra, strict=True)]
    return SpectrumReport(
        label=source.label,
        total=_group("all", "", layers),
        parts=tuple(
            _group(part, part, [layer for layer in layers if layer.part == part])
            for part in dict.fromkeys(layer.part for layer in layers)
        ),
        blocks=tuple(
            _group(block, part, [layer for layer in layers if (layer.part, layer.block) == (part, block)])
            for part, block in dict.fromkeys((layer.part, layer.block) for layer in layers)
        ),
        layers=tuple(layers),
        costs=tuple(rank_cost(catalogue, rank) for rank in RANKS),
    )


def _measured(layer: Layer, values: Tensor) -> LayerSpectrum:
    curve = energy_curve(values)
    return LayerSpectrum(
        name=layer.name,
        part=layer.part.value,
        block=layer.block,
        kind=layer.kind.value,
        shape=layer.shape,
        full_rank=layer.full_rank,
        norm=float(values.square().sum().sqrt()),
        largest=float(values[0]),
        energies={rank: energy_at(curve, rank) for rank in CURVE_RANKS},
        rank_90=rank_for_energy(values, SHOWN_ENERGY),
        decay=decay_exponent(values),
    )


def _group(name: str, part: str, layers: Sequence[LayerSpectrum]) -> GroupSpectrum:
    squares = [layer.norm**2 for layer in layers]
    total = sum(squares)

    def energy(rank: int) -> float:
        if total == 0.0:
            return 1.0
        held = sum(square * layer.energies[rank] for square, layer in zip(squares, layers, strict=True))
        return min(held / total, 1.0)  # rounding can exceed 1

    decays = [layer.decay for layer in layers if layer.decay is not None]
    return GroupSpectrum(
        name=name,
        part=part,
        layers=len(layers),
        norm=total**0.5,
        smallest_full_rank=min(layer.full_rank for layer in layers),
        largest_full_rank=max(layer.full_rank for layer in layers),
        energies={rank: energy(rank) for rank in CURVE_RANKS},
        lowest={rank: min(layer.energies[rank] for layer in layers) for rank in CURVE_RANKS},
        highest={rank: max(layer.energies[rank] for layer in layers) for rank in CURVE_RANKS},
        median_rank_90=median(layer.rank_90 for layer in layers),
        median_decay=median(decays) if decays else None,
    )
