"""Choose the rank of every layer by a fixed rank, an energy or a file size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.adapters.writer import adapter_infos
from spectune.core.rank import (
    BudgetRank,
    EnergyRank,
    FixedRank,
    Price,
    best_ranks,
    rank_for_energy,
)
from spectune.errors import InputError
from spectune.files.dtypes import SAFETENSORS_NAMES
from spectune.files.pipeline import Progress
from spectune.files.source import TensorInfo, WeightSource
from spectune.files.writer import RESERVE_BYTES
from spectune.pairs.sizes import format_bytes, parse_bytes
from spectune.pairs.spectrum_report import all_spectra
from spectune.sdxl.layers import Layer

__all__ = [
    "BudgetRank",
    "EnergyRank",
    "FixedRank",
    "RankPlan",
    "RankRequest",
    "choose_ranks",
    "file_bytes",
    "rank_request",
]

RankRequest = FixedRank | EnergyRank | BudgetRank
DEFAULT_RANK = 64

# Upper bound of the header length, its alignment, and the metadata with the longest file names.
_METADATA_BYTES = 8192
# Has as many digits as the largest offset in the header of a file of up to 10 TB.
_LONG_OFFSET = 10**12


def rank_request(
    rank: int | None, conv_rank: int | None, energy: float | None, size: str | int | None
) -> RankRequest:
    """Return how to choose ranks, by default rank 64; pass at most one of rank, energy and size."""
    if energy is not None:
        return EnergyRank(energy)
    if size is not None:
        return BudgetRank(parse_bytes(size) if isinstance(size, str) else size)
    return FixedRank(DEFAULT_RANK if rank is None else rank, conv_rank)


@dataclass(frozen=True)
class RankPlan:
    """The rank of each layer of a principal, and the size of the file."""

    # by layer name, at least 1, in the order of the layers; alpha equals the rank
    ranks: Mapping[str, int]
    left_out: tuple[str, ...]  # layers of rank 0: the residual keeps their full weight
    label: str  # for file names: r64, r64-c32, e0.90, 600MB
    parameters: int
    nbytes: int  # upper bound of the size of the principal file
    energy: float | None  # share of the squared norm of all layers, 0..1; None if not measured


def choose_ranks(
    source: WeightSource,
    layers: Sequence[Layer],
    request: RankRequest,
    *,
    store: torch.dtype,
    progress: Progress | None = None,
) -> RankPlan:
    """Return the ranks of `layers` for a request, with factors stored as `store`.

    A fixed rank needs only shapes. An energy or a budget reads every weight once; progress counts layers.
    The energy of the plan is a sum over all layers, so a layer with a larger norm counts more.
    Raises InputError for weights that are not finite, and for a budget that is too small for any direction.
    """
    if isinstance(request, FixedRank):
        ranks = [request.true_rank(layer.shape) for layer in layers]
        return _plan(layers, ranks, request, store, energy=None)
    spectra = all_spectra(source, layers, progress)
    ranks = ranks_of_spectra(layers, spectra, request, store=store)
    return _plan(layers, ranks, request, store, energy=_captured(spectra, ranks))


def ranks_of_spectra(
    layers: Sequence[Layer],
    spectra: Sequence[Tensor],
    request: EnergyRank | BudgetRank,
    *,
    store: torch.dtype,
) -> list[int]:
    """Return the rank of each layer from its singular values; rank 0 leaves a layer out."""
    if isinstance(request, EnergyRank):
        return [_for_energy(values, request) for values in spectra]
    return _for_budget(layers, spectra, request, store)


def _for_energy(values: Tensor, request: EnergyRank) -> int:
    rank = rank_for_energy(values, request.share)
    return rank if request.max_rank is None else min(rank, request.max_rank)


def _for_budget(
    layers: Sequence[Layer], spectra: Sequence[Tensor], request: BudgetRank, store: torch.dtype
) -> list[int]:
    prices = [layer_price(layer, store) for layer in layers]
    ranks = best_ranks(spectra, prices, request.nbytes - empty_file_bytes())
    if not any(ranks):
        least = min((price.entry + price.direction for price in prices), default=0) + empty_file_bytes()
        raise InputError(
            f"a budget of {format_bytes(request.nbytes)} does not hold rank 1 of any of the {len(layers)} "
            "layers",
            hint=f"the smallest adapter takes {least:,} bytes; `spectune inspect --spectrum` lists the sizes",
        )
    return list(ranks)


def _plan(
    layers: Sequence[Layer],
    ranks: Sequence[int],
    request: RankRequest,
    store: torch.dtype,
    *,
    energy: float | None,
) -> RankPlan:
    chosen = {layer.name: rank for layer, rank in zip(layers, ranks, strict=True) if rank}
    kept = [layer for layer in layers if layer.name in chosen]
    return RankPlan(
        ranks=chosen,
        left_out=tuple(layer.name for layer in layers if layer.name not in chosen),
        label=request_label(request),
        parameters=sum(chosen[layer.name] * (layer.in_features + layer.out_features) for layer in kept),
        nbytes=file_bytes(kept, chosen, store),
        energy=energy,
    )


def _captured(spectra: Sequence[Tensor], ranks: Sequence[int]) -> float:
    total = sum(float(values.square().sum()) for values in spectra)
    kept = sum(float(v[:rank].square().sum()) for v, rank in zip(spectra, ranks, strict=True))
    return kept / total if total else 1.0


def request_label(request: RankRequest) -> str:
    """Return the part of a file name for a request: `r64`, `r64-c32`, `e0.90`, `e0.90-r128` or `600MB`."""
    match request:
        case FixedRank(rank, conv_rank):
            return f"r{rank}" if conv_rank in (None, rank) else f"r{rank}-c{conv_rank}"
        case EnergyRank(share, max_rank):
            digits = max(2, len(f"{share:.6f}".rstrip("0").partition(".")[2]))
            return f"e{share:.{digits}f}" + ("" if max_rank is None else f"-r{max_rank}")
        case BudgetRank(nbytes):
            return format_bytes(nbytes)


def file_bytes(layers: Sequence[Layer], ranks: Mapping[str, int], store: torch.dtype) -> int:
    """Return an upper bound of the size of an adapter file, at most a few percent too large."""
    prices = [(layer_price(layer, store), ranks[layer.name]) for layer in layers]
    return empty_file_bytes() + sum(price.entry + rank * price.direction for price, rank in prices)


def empty_file_bytes() -> int:
    """Return the size of an adapter file without layers: metadata and the space reserved for hashes."""
    return RESERVE_BYTES + _METADATA_BYTES


def layer_price(layer: Layer, store: torch.dtype) -> Price:
    """Return the bytes of a layer: header entries and alpha once, plus (in + out) * itemsize per rank."""
    infos = adapter_infos([layer], {layer.name: layer.full_rank}, store)
    entries = sum(len(_header_entry(info)) for info in infos)
    alpha = torch.float32.itemsize
    return Price(entry=entries + alpha, direction=(layer.in_features + layer.out_features) * store.itemsize)


def _header_entry(info: TensorInfo) -> str:
    """Return the longest possible header entry of a tensor, with its separator."""
    described = {
        "dtype": SAFETENSORS_NAMES[info.dtype],
        "shape": list(info.shape),
        "data_offsets": [_LONG_OFFSET, _LONG_OFFSET],
    }
    return json.dumps({info.name: described}, separators=(",", ":"))
