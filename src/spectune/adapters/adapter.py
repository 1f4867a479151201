"""Adapters in memory: a low-rank matrix, a trained delta or another change per layer, read on access."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from spectune.adapters.kinds.change import WeightChange
from spectune.core.delta import Delta
from spectune.core.low_rank import LowRank, common_dtype
from spectune.files.provenance import HasProvenance
from spectune.files.reader import Checkpoint
from spectune.files.source import TensorInfo
from spectune.sdxl.layers import Catalogue
from spectune.sdxl.names import TensorView

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
MID = "lora_mid.weight"  # LoCon with use_tucker: the kernel of a convolution, (rank, rank, kh, kw)
FRAME_DOWN, FRAME_UP = "frame_down.weight", "frame_up.weight"
DELTA_DOWN, DELTA_UP = "delta_down.weight", "delta_up.weight"
LOW_RANK_SUFFIXES = (DOWN, UP, ALPHA)
DELTA_SUFFIXES = (FRAME_DOWN, FRAME_UP, DELTA_DOWN, DELTA_UP, ALPHA)
REPLACED = "replaced."  # key prefix of tensors that replace a tensor of the base completely
REPLACED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

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

    # by their names in the single-file checkpoint; deltas are added to them
    replaced: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def replaced_infos(self) -> Mapping[str, TensorInfo]:
        """The shapes and dtypes of `replaced`, without reading it from a file."""
        return tensor_infos(self.replaced)

    def rank(self, name: str) -> int:
        """Return the rank of a layer's frame without reading it."""
        return (
            self.layers.ranks[name] if isinstance(self.layers, LazyLayers) else self.layers[name].frame.rank
        )


@dataclass(frozen=True)
class ParameterDifference:
    """A difference of a parameter that is not the weight of a layer: of a bias, norm or embedding."""

    view: TensorView  # the parameter in the single-file checkpoint
    shape: tuple[int, ...]  # of the difference
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class GeneralAdapter(_Layers[WeightChange]):
    """An adapter that is more than a product of two factors per layer."""

    # parameter, such as "unet.out.0.bias" -> its difference
    differences: Mapping[str, ParameterDifference] = field(default_factory=dict[str, ParameterDifference])
    # layer or other module -> suffix -> key in the file
    keys: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    kinds: Mapping[str, str] = field(default_factory=dict[str, str])  # layer -> "LoHa", "DoRA of LoKr"


AnyAdapter = Adapter | TunedAdapter | GeneralAdapter


class LazyMapping(Mapping[str, T], Generic[T]):
    """A mapping that reads a value from the file on every access."""

    def __init__(self, names: Iterable[str], read: Callable[[str], T]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class LazyLayers(LazyMapping[T]):
    """A mapping that reads a layer on every access. Its rank and dtype are known without reading it."""

    def __init__(
        self, ranks: Mapping[str, int], dtypes: Mapping[str, torch.dtype], read: Callable[[str], T]
    ) -> None:
        super().__init__(ranks, read)
        self.ranks = dict(ranks)
        self.dtypes = dict(dtypes)  # each wide enough for both factors


class LazyTensors(LazyMapping[Tensor]):
    """A mapping that reads a tensor on every access. Its shape and dtype are known without reading it."""

    def __init__(self, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> None:
        super().__init__(infos, read)
        self.infos = dict(infos)


def tensor_infos(tensors: Mapping[str, Tensor]) -> Mapping[str, TensorInfo]:
    """Return shapes and dtypes; a lazy mapping is not read."""
    if isinstance(tensors, LazyTensors):
        return tensors.infos
    return {name: TensorInfo(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()}
