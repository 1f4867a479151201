"""Which layers of a checkpoint can be factored, one record each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from torch import Tensor

from spectune.files.source import TensorInfo, WeightSource
from spectune.sdxl.layout import Layout, UNetLayout, layout_of, require, te1_root
from spectune.sdxl.names import Duty, Module, Part, diffusers_module, kohya_stem, modules_of

__all__ = ["Catalogue", "Kind", "Layer", "Part", "build_catalogue", "layer_weight", "squeezed"]


class Kind(StrEnum):
    LINEAR = "linear"
    CONV = "conv"


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution that can be factored."""

    name: str  # canonical and unique: "unet.input_blocks.4.1.proj_in"
    part: Part
    kind: Kind
    shape: tuple[int, ...]  # of the layer's own weight: (out, in) or (out, in, kh, kw)
    tensor: str  # the tensor of the single file that holds it
    rows: tuple[int, int] | None  # its rows of that tensor if it is fused, else None
    block: str  # "down.1", "mid", "up.0", "embed", "te1.3"
    default: bool  # among the modules that LyCORIS preset=full trains
    diffusers: str  # "unet.down_blocks.1.attentions.0.proj_in"

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight as a matrix: in, or in * kh * kw."""
        return math.prod(self.shape[1:])

    @property
    def full_rank(self) -> int:
        return min(self.out_features, self.in_features)

    @property
    def row_slice(self) -> slice:
        """Its rows of the tensor that holds it."""
        return slice(None) if self.rows is None else slice(*self.rows)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of down and up, as LyCORIS stores them: a 1x1 convolution keeps four axes."""
        ones = (1,) * (len(self.shape) - 2)
        return (rank, *self.shape[1:]), (self.out_features, rank, *ones)

    @property
    def kohya(self) -> str:
        """The stem of its keys in adapter files."""
        return kohya_stem(self.name)


@dataclass(frozen=True)
class Catalogue:
    """The layers of one checkpoint, in a fixed order: UNet, first encoder, second encoder."""

    layers: tuple[Layer, ...]
    unet: UNetLayout

    @cached_property
    def by_name(self) -> Mapping[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def by_kohya(self) -> Mapping[str, Layer]:
        return {layer.kohya: layer for layer in self.layers}

    @cached_property
    def by_tensor(self) -> Mapping[str, tuple[Layer, ...]]:
        """The layers of each tensor: one, or three where q, k, v are fused."""
        found: dict[str, tuple[Layer, ...]] = {}
        for layer in self.layers:
            found[layer.tensor] = (*found.get(layer.tensor, ()), layer)
        return found

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the axes of a 1x1 kernel, which programs write or leave out."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def build_catalogue(
    source: WeightSource | Mapping[str, TensorInfo] | Sequence[TensorInfo], *, all_layers: bool = False
) -> Catalogue:
    """The layers that LyCORIS `preset=full` trains; with `all_layers` also the UNet's embeddings and ends.

    Raises InputError if the tensors are not those of an SDXL.
    """
    tensors, label = _tensors_of(source)
    layout = layout_of(tensors, label=label)
    duties = (Duty.DEFAULT, Duty.EXTRA) if all_layers else (Duty.DEFAULT,)
    root = te1_root(tensors)
    chosen = [
        (part, module)
        for part in Part
        for module in modules_of(layout, part.value, te1=root)
        if module.duty in duties
    ]
    require(tensors, list(dict.fromkeys(module.weight.tensor for _, module in chosen)), label)
    return Catalogue(tuple(_layer(module, part, tensors, layout) for part, module in chosen), layout.unet)


def layer_weight(source: WeightSource, layer: Layer) -> Tensor:
    """The weight of a layer; for a fused one a view of its rows."""
    return source.load(layer.tensor)[layer.row_slice]


def _tensors_of(
    source: WeightSource | Mapping[str, TensorInfo] | Sequence[TensorInfo],
) -> tuple[Mapping[str, TensorInfo], str]:
    if isinstance(source, Mapping):
        return source, "the checkpoint"
    if isinstance(source, Sequence):
        return {info.name: info for info in source}, "the checkpoint"
    return source.tensors, source.label


def _layer(module: Module, part: Part, tensors: Mapping[str, TensorInfo], layout: Layout) -> Layer:
    view = module.weight
    shape = tensors[view.tensor].shape
    if view.rows is not None:
        shape = (view.rows[1] - view.rows[0], *shape[1:])
    return Layer(
        name=module.layer,
        part=part,
        kind=Kind.LINEAR if len(shape) == 2 else Kind.CONV,
        shape=shape,
        tensor=view.tensor,
        rows=view.rows,
        block=module.block,
        default=module.duty is Duty.DEFAULT,
        diffusers=diffusers_module(module.layer, layout.unet),
    )


RANKS = (16, 32, 64, 128, 256)  # for which reports list costs


@dataclass(frozen=True)
class RankCost:
    """What a principal of one rank takes."""

    rank: int
    parameters: int
    file_bytes: int  # factors in 16 bits
    training_bytes: int  # deltas, gradients and two AdamW moments in float32 beside 16-bit factors


def rank_cost(catalogue: Catalogue, rank: int) -> RankCost:
    """Parameters and bytes of a principal of `rank`; a layer smaller than that keeps its full rank."""
    parameters = sum(
        min(rank, layer.full_rank) * (layer.in_features + layer.out_features) for layer in catalogue.layers
    )
    return RankCost(rank, parameters, file_bytes=2 * parameters, training_bytes=(2 + 4 * 4) * parameters)
