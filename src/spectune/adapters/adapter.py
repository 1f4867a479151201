"""Adapters in memory: a low-rank matrix or a trained delta per layer; each layer is read on access."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from spectune.core.delta import Delta
from spectune.core.low_rank import LowRank, common_dtype
from spectune.files.provenance import HasProvenance
from spectune.files.reader import Checkpoint
from spectune.sdxl.layers import Catalogue

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
MID = "lora_mid.weight"  # LoCon with use_tucker: the kernel of a convolution, (rank, rank, kh, kw)
FRAME_DOWN, FRAME_UP = "frame_down.weight", "frame_up.weight"
DELTA_DOWN, DELTA_UP = "delta_down.weight", "delta_up.weight"
LOW_RANK_SUFFIXES = (DOWN, UP, ALPHA)
DELTA_SUFFIXES = (FRAME_DOWN, FRAME_UP, DELTA_DOWN, DELTA_UP, ALPHA)
REPLACED = "replaced."  # key prefix of tensors that replace a tensor of the base completely

T = TypeVar("T")


@dataclass(frozen=True)
class _Layers(HasProvenance, Generic[T]):
    layers: Mapping[str, T]  # by the layer's canonical name
    metadata: Mapping[str, str]
    label: str
    warnings: tuple[str, ...] = ()  # about missing declarations in the file
    file: Checkpoint | None = None  # layers are read from it on access; leaving the context closes it
    catalogue: Catalogue | None = None  # of the model that the adapter was opened for

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()


class Adapter(_Layers[LowRank]):
    """A low-rank matrix per layer: a principal or any LoRA."""

    def rank(self, name: str) -> int:
        """Return the rank of a layer without reading it."""
        return self.layers.ranks[name] if isinstance(self.layers, LazyLayers) else self.layers[name].rank

    def dtype(self, name: str) -> torch.dtype:
        """Return a dtype that holds both factors of a layer."""
        if isinstance(self.layers, LazyLayers):
            return self.layers.dtypes[name]
        return common_dtype([self.layers[name].down.dtype, self.layers[name].up.dtype])


@dataclass(frozen=True)
class TunedAdapter(_Layers[Delta]):
    """A trained delta per layer, and tensors that replace those of the base completely."""

    # in float32, by their names in the single-file checkpoint; deltas are added to them
    replaced: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def rank(self, name: str) -> int:
        """Return the rank of a layer's frame without reading it."""
        return (
            self.layers.ranks[name] if isinstance(self.layers, LazyLayers) else self.layers[name].frame.rank
        )


class LazyLayers(Mapping[str, T], Generic[T]):
    """A mapping that reads a layer from the file on every access; ranks and dtypes need no reading."""

    def __init__(
        self, ranks: Mapping[str, int], dtypes: Mapping[str, torch.dtype], read: Callable[[str], T]
    ) -> None:
        self.ranks = dict(ranks)
        self.dtypes = dict(dtypes)  # each wide enough for both factors
        self._read = read

    def __getitem__(self, name: str) -> T:
        if name not in self.ranks:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.ranks

    def __iter__(self) -> Iterator[str]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)
