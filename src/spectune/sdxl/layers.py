"""The layers of a checkpoint that can be factored: one record per layer, and the catalogue of all layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from torch import Tensor

from spectune.errors import InputError, check_all
from spectune.files.source import TensorInfo, WeightSource
from spectune.sdxl.inference import part_layouts
from spectune.sdxl.layout import NOT_SDXL, UNetLayout, require
from spectune.sdxl.names import Module, Part, diffusers_name, kohya_stem, modules_of

__all__ = ["Catalogue", "Kind", "Layer", "Part", "build_catalogue", "layer_weight", "squeezed"]


class Kind(StrEnum):
    """What a layer computes."""

    LINEAR = "linear"
    CONV = "conv"


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution that can be factored."""

    name: str  # canonical and unique: "unet.input_blocks.4.1.proj_in"
    part: Part
    kind: Kind
    shape: tuple[int, ...]  # of the weight: (out, in) or (out, in, kh, kw)
    tensor: str  # the single-file tensor that contains the weight
    rows: tuple[int, int] | None  # of a fused tensor: first row, one past the last
    block: str  # "down.1", "mid", "up.0", "embed", "te1.3"
    default: bool  # whether LyCORIS preset=full trains it
    diffusers: str  # "unet.down_blocks.1.attentions.0.proj_in"

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Return the number of columns of the weight as a matrix: in, or in * kh * kw."""
        return math.prod(self.shape[1:])

    @property
    def full_rank(self) -> int:
        return min(self.out_features, self.in_features)

    @property
    def row_slice(self) -> slice:
        """Return the rows of `tensor` that belong to the layer."""
        return slice(None) if self.rows is None else slice(*self.rows)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of down and up as in LyCORIS: the factors of a 1x1 convolution have four axes."""
        ones = (1,) * (len(self.shape) - 2)
        return (rank, *self.shape[1:]), (self.out_features, rank, *ones)

    @property
    def kohya(self) -> str:
        """Return the stem of the layer's keys in kohya adapters."""
        return kohya_stem(self.name)


@dataclass(frozen=True)
class Catalogue:
    """The layers of a checkpoint in the order UNet, first encoder, second encoder."""

    layers: tuple[Layer, ...]
    unet: UNetLayout
    modules: tuple[Module, ...] = ()  # of the UNet and the encoders, also those without a factored weight

    @cached_property
    def by_name(self) -> Mapping[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def by_kohya(self) -> Mapping[str, Layer]:
        return {layer.kohya: layer for layer in self.layers}

    @cached_property
    def by_tensor(self) -> Mapping[str, tuple[Layer, ...]]:
        """Return the layers of each tensor: one, or three if q, k, v are fused."""
        layers: dict[str, tuple[Layer, ...]] = {}
        for layer in self.layers:
            layers[layer.tensor] = (*layers.get(layer.tensor, ()), layer)
        return layers

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the axes of a 1x1 kernel, which not all programs write."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def build_catalogue(
    source: WeightSource | Mapping[str, TensorInfo], *, all_layers: bool = False
) -> Catalogue:
    """Return the layers that LyCORIS preset=full trains; see `all_layers` for the others.

    `all_layers` adds the embeddings and the first and last convolution of the UNet. Raises InputError if the
    tensors are not those of an SDXL.
    """
    is_mapping = isinstance(source, Mapping)
    tensors, label = (source, "the checkpoint") if is_mapping else (source.tensors, source.label)
    layout = part_layouts(tensors, label=label)
    modules = [(part, module) for part in Part for module in modules_of(layout, part.value)]
    chosen = [
        (part, module) for part, module in modules if (module.factorable if all_layers else module.default)
    ]
    require(tensors, list(dict.fromkeys(module.weight.tensor for _, module in chosen)), label)

    def layer(entry: tuple[Part, Module]) -> Layer:
        part, module = entry
        return layer_of(part, module, _shape(module, tensors, label), layout.unet)

    return Catalogue(tuple(check_all(chosen, layer)), layout.unet, tuple(module for _, module in modules))


def layer_of(part: Part, module: Module, shape: tuple[int, ...], unet: UNetLayout) -> Layer:
    """Return the record of a module whose weight has this shape; the shape determines its rows."""
    rows = module.weight.rows
    if rows is not None:
        index = rows[0] // (rows[1] - rows[0])
        rows = (index * shape[0], (index + 1) * shape[0])
    return Layer(
        name=module.layer,
        part=part,
        kind=Kind.LINEAR if len(shape) == 2 else Kind.CONV,
        shape=shape,
        tensor=module.weight.tensor,
        rows=rows,
        block=module.block,
        default=module.default,
        diffusers=diffusers_name(module.layer, unet),
    )


def _shape(module: Module, tensors: Mapping[str, TensorInfo], label: str) -> tuple[int, ...]:
    """Return the shape of a module's weight, which may be a third of the rows of a tensor."""
    view, shape = module.weight, tensors[module.weight.tensor].shape
    if len(shape) != module.axes or 0 in shape:
        raise InputError(
            f"{view.tensor} of {label} has shape {shape}: expected {module.axes} axes that are not empty",
            hint=NOT_SDXL,
        )
    if view.rows is None:
        return shape
    rows = view.rows[1] - view.rows[0]
    if shape[0] != 3 * rows:
        raise InputError(
            f"{view.tensor} of {label} has shape {shape}: expected {3 * rows} rows, {rows} each for q, k and "
            "v",
            hint=NOT_SDXL,
        )
    return (rows, *shape[1:])


def layer_weight(source: WeightSource, layer: Layer) -> Tensor:
    """Return the weight of a layer. If several layers share one tensor, return a view of the layer's rows."""
    return source.load(layer.tensor)[layer.row_slice]


RANKS = (16, 32, 64, 128, 256)  # in tables of costs


@dataclass(frozen=True)
class RankCost:
    """The cost of a principal of one rank, on disk and in training memory."""

    rank: int
    parameters: int
    file_bytes: int  # factors in 16 bits
    training_bytes: int  # 16-bit factors; deltas, gradients and two AdamW moments in float32


def rank_cost(catalogue: Catalogue, rank: int) -> RankCost:
    """Return the cost of a principal of `rank`; a smaller layer has its full rank."""
    parameters = sum(
        min(rank, layer.full_rank) * (layer.in_features + layer.out_features) for layer in catalogue.layers
    )
    return RankCost(rank, parameters, file_bytes=2 * parameters, training_bytes=(2 + 4 * 4) * parameters)
