"""Quantize the frozen linear layers of a model in place and measure the error of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectune.core.low_rank import LowRank, product
from spectune.errors import InputError
from spectune.model.inject import AdaptedLayer
from spectune.model.network import Sdxl
from spectune.model.packed_linear import PackedLinear, Packing, pack, unpack
from spectune.sdxl.names import Part, modules_of


@dataclass
class PartError:
    """The error of quantizing the layers of one part, with squares of Frobenius norms, summed over layers."""

    part: Part
    layers: int = 0
    weight_square: float = 0.0  # of W, the weights with their principals
    residual_square: float = 0.0  # of R, the quantized matrices; without a principal, R = W
    residual_error_square: float = 0.0  # of Q(R) - R
    weight_error_square: float = 0.0  # of Q(W) - W: the error if W itself were quantized
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def residual_share(self) -> float:
        """|R| / |W|."""
        return self._relative(self.residual_square)

    @property
    def residual_error(self) -> float:
        """|Q(R) - R| / |W|: the error of the model."""
        return self._relative(self.residual_error_square)

    @property
    def weight_error(self) -> float:
        """|Q(W) - W| / |W|: the error if W itself were quantized."""
        return self._relative(self.weight_error_square)

    def _relative(self, square: float) -> float:
        return math.sqrt(square / (self.weight_square or 1.0))  # weights of zeros have no error

    def __str__(self) -> str:
        return (
            f"{self.part}: {self.layers} linear layers, {_megabytes(self.bytes_before)} -> "
            f"{_megabytes(self.bytes_after)}, error of the weights {self.residual_error:.2%} "
            f"({self.weight_error:.2%} without the residual form)"
        )


@torch.no_grad()
def quantize_layers(
    model: Sdxl,
    packing: Packing,
    *,
    frames: Mapping[str, LowRank] | None = None,
    device: torch.device | None = None,
) -> list[PartError]:
    """Quantize the `linear_layers` of the UNet and the text encoders in place; return the error of each part.

    In an adapted layer, the base is quantized. Convolutions, norms and embeddings are not quantized.

    Args:
        model: The model to change.
        packing: The format of the quantized weights.
        frames: The principals that were subtracted from the weights, by layer name. They are used to measure
            the error of quantizing the full weights instead.
        device: The device of the quantized weights; None means their current device.

    Raises:
        InputError: A layer is already quantized.
    """
    errors = {part: PartError(part) for part in Part}
    for name in linear_layers(model):
        base = base_layer(model, name)
        if isinstance(base, PackedLinear):
            raise InputError(f"{name} is already quantized")
        packed = PackedLinear(base, packing, device)
        setattr(*_base_place(model, name), packed)
        _add_error(errors[Part(name.partition(".")[0])], base, packed, (frames or {}).get(name))
    return [error for error in errors.values() if error.layers]


def linear_layers(model: Sdxl) -> list[str]:
    """Return the linear layers that `spectune split` factors by default, in catalogue order.

    In a model with adapters, text encoders without adapters are excluded. They have no principal, and
    quantizing their full weights distorts captions far more (docs/reference/small-cards.md).
    """
    adapted = _adapted_parts(model)
    parts = {*adapted, Part.UNET} if adapted else set(Part)
    return [
        module.layer
        for part in Part
        for module in modules_of(model.layout, part.value)
        if part in parts and module.default and isinstance(base_layer(model, module.layer), nn.Linear)
    ]


def _adapted_parts(model: Sdxl) -> set[Part]:
    roots = {Part.UNET: model.unet, Part.TE1: model.te1, Part.TE2: model.te2}
    return {part for part, root in roots.items() if any(isinstance(m, AdaptedLayer) for m in root.modules())}


def _base_place(model: Sdxl, name: str) -> tuple[nn.Module, str]:
    """Return the parent and attribute of a layer, or of the base inside an adapted layer."""
    parent, attribute = model.place(name)
    layer = getattr(parent, attribute)
    return (layer, "base") if isinstance(layer, AdaptedLayer) else (parent, attribute)


def base_layer(model: Sdxl, name: str) -> nn.Linear:
    """Return a layer of `linear_layers`, without its adapter if it has one."""
    return getattr(*_base_place(model, name))


def _add_error(error: PartError, base: nn.Linear, packed: PackedLinear, frame: LowRank | None) -> None:
    residual = base.weight.to(packed.scales.device, torch.float32)
    residual_error = _square(packed.unpacked(torch.float32) - residual)
    weight, weight_error = residual, residual_error
    if frame is not None:
        weight = residual + product(frame).to(residual.device)
        shape = (base.out_features, base.in_features)
        rounded = unpack(pack(weight, packed.packing), packed.packing, shape, torch.float32)
        weight_error = _square(rounded - weight)
    error.layers += 1
    error.weight_square += _square(weight)
    error.residual_square += _square(residual)
    error.residual_error_square += residual_error
    error.weight_error_square += weight_error
    error.bytes_before += base.weight.nbytes
    error.bytes_after += packed.nbytes


def _square(matrix: Tensor) -> float:
    """Return the squared Frobenius norm."""
    return float(torch.linalg.vector_norm(matrix.float())) ** 2


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
