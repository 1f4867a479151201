"""The singular spectra of a checkpoint by layer, block and part."""

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

# Two or three steps per octave, enough for a smooth curve; includes the five ranks of the tables.
CURVE_RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SHOWN_ENERGY = 0.9  # `rank_90` is its rank


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
    energies: Mapping[int, float]  # by CURVE_RANKS; 1 at and above the full rank
    rank_90: int  # directions that hold 90 % of the energy
    decay: float | None  # a of s_i ~ i^-a over the first 256 values


@dataclass(frozen=True)
class GroupSpectrum:
    """The layers of a part, of a block, or all; energies are shares of the sum of their squared norms."""

    name: str
    part: str  # empty for all layers
    layers: int
    norm: float
    smallest_full_rank: int
    largest_full_rank: int
    energies: Mapping[int, float]  # by CURVE_RANKS
    lowest: Mapping[int, float]  # of any single layer
    highest: Mapping[int, float]
    median_rank_90: float
    median_decay: float | None


@dataclass(frozen=True)
class SpectrumReport:
    """The spectra of a checkpoint; groups and layers in the order of the network."""

    label: str
    total: GroupSpectrum
    parts: tuple[GroupSpectrum, ...]
    blocks: tuple[GroupSpectrum, ...]
    layers: tuple[LayerSpectrum, ...]
    costs: tuple[RankCost, ...]  # of principals of the ranks 16, 32, 64, 128, 256

    def smaller_than(self, rank: int) -> tuple[LayerSpectrum, ...]:
        """Return the layers whose full rank is below `rank`."""
        return tuple(layer for layer in self.layers if layer.full_rank < rank)


def all_spectra(
    source: WeightSource, layers: Sequence[Layer], progress: Progress | None = None
) -> tuple[Tensor, ...]:
    """Return the singular values (full rank) of every layer, float64 descending, in the order of `layers`.

    Every tensor is read once; only a few are in memory at a time. Progress counts layers. Raises InputError
    for dtypes other than those of weights, and for NaN and infinite values.
    """
    places: dict[str, list[int]] = {}  # by tensor, which q, k and v may share
    for place, layer in enumerate(layers):
        check_dtype(source.tensors[layer.tensor].dtype, f"layer {layer.name} of {source.label}")
        places.setdefault(layer.tensor, []).append(place)
    found: dict[int, Tensor] = {}

    def measure(tensor_name: str) -> list[Tensor]:
        tensor = source.load(tensor_name)
        return [_values(tensor, layers[place], source.label) for place in places[tensor_name]]

    def collect(tensor_name: str, values: list[Tensor]) -> None:
        found.update(zip(places[tensor_name], values, strict=True))
        report_progress(progress, len(found), len(layers), tensor_name)

    run_pipeline(places, measure, collect, size=lambda name: source.tensors[name].nbytes)
    return tuple(found[place] for place in range(len(layers)))


def _values(tensor: Tensor, layer: Layer, label: str) -> Tensor:
    return singular_values(to_matrix(tensor[layer.row_slice]), name=f"layer {layer.name} of {label}")


def measure_spectra(
    source: WeightSource, catalogue: Catalogue, progress: Progress | None = None
) -> SpectrumReport:
    """Measure the spectrum of every layer of `catalogue`; a full SDXL takes a minute or two on two cores.

    Progress counts layers. Raises InputError as `all_spectra` does.
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
