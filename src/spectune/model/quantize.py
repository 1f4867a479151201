"""Quantize the frozen linear layers of a model in place and measure the error of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectune.core.low_rank import LowRank, product
from spectune.errors import InputError
from spectune.model.inject import AdaptedLayer
from spectune.model.network import Sdxl
from spectune.model.packed_linear import PackedLinear, Packing, pack, unpack
from spectune.sdxl.names import Part, modules_of


@dataclass(frozen=True)
class LayerError:
    """The error of quantizing one layer, in squared Frobenius norms, which can be summed over layers."""

    part: Part
    weight: float  # of W, the weight with its principal
    residual: float  # of R, the quantized matrix; without a principal, R = W
    residual_error: float  # of Q(R) - R
    weight_error: float  # of Q(W) - W: the error if W itself were quantized
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class PartError:
    """The error of quantizing the layers of one part, relative to the norm of their weights W."""

    part: Part
    layers: int
    residual_share: float  # |R| / |W|
    residual_error: float  # |Q(R) - R| / |W|: the error of the model
    weight_error: float  # |Q(W) - W| / |W|: the error if W itself were quantized
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"{self.part}: {self.layers} linear layers, {_megabytes(self.bytes_before)} -> "
            f"{_megabytes(self.bytes_after)}, error of the weights {self.residual_error:.2%} "
            f"({self.weight_error:.2%} without the residual form)"
        )


@dataclass(frozen=True)
class QuantizationReport:
    """The memory and the error of a quantized model."""

    packing: Packing
    layers: Mapping[str, LayerError]  # by layer name

    @property
    def parts(self) -> tuple[PartError, ...]:
        """One record for each part with quantized layers: UNet, first and second text encoder."""
        by_part = {part: [e for e in self.layers.values() if e.part is part] for part in Part}
        return tuple(_summed(part, errors) for part, errors in by_part.items() if errors)


def quantize_layers(
    model: Sdxl,
    names: Iterable[str] | None,
    packing: Packing,
    *,
    frames: Mapping[str, LowRank] | None = None,
    device: torch.device | None = None,
) -> QuantizationReport:
    """Quantize linear layers of the UNet and the text encoders in place.

    In an adapted layer, the base is quantized. Convolutions, norms and embeddings are not quantized.

    Args:
        model: The model to change.
        names: Layer names; None means `linear_layers`.
        packing: The format of the quantized weights.
        frames: The principals that were subtracted from the weights, by layer name. They are used to measure
            the error of quantizing the full weights instead.
        device: The device of the quantized weights; None means their current device.

    Raises:
        InputError: A named layer is not linear or is already quantized.
    """
    chosen = linear_layers(model) if names is None else list(names)
    frames = frames or {}
    return QuantizationReport(
        packing, {name: _quantize_layer(model, name, packing, frames.get(name), device) for name in chosen}
    )


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
        if part in parts and module.default and isinstance(_base(model, module.layer), nn.Linear)
    ]


def _adapted_parts(model: Sdxl) -> set[Part]:
    roots = {Part.UNET: model.unet, Part.TE1: model.te1, Part.TE2: model.te2}
    return {part for part, root in roots.items() if any(isinstance(m, AdaptedLayer) for m in root.modules())}


def _base_place(model: Sdxl, name: str) -> tuple[nn.Module, str]:
    """Return the parent and attribute of a layer, or of the base inside an adapted layer."""
    parent, attribute = model.place(name)
    layer = getattr(parent, attribute)
    return (layer, "base") if isinstance(layer, AdaptedLayer) else (parent, attribute)


def _base(model: Sdxl, name: str) -> nn.Module:
    return getattr(*_base_place(model, name))


@torch.no_grad()
def _quantize_layer(
    model: Sdxl, name: str, packing: Packing, frame: LowRank | None, device: torch.device | None
) -> LayerError:
    base = _base(model, name)
    if isinstance(base, PackedLinear):
        raise InputError(f"{name} is already quantized")
    if not isinstance(base, nn.Linear):
        raise InputError(f"{name} is a {type(base).__name__}: only linear layers can be quantized")
    packed = PackedLinear(base, packing, device)
    setattr(*_base_place(model, name), packed)
    return _measured(Part(name.partition(".")[0]), base, packed, frame)


def _measured(part: Part, base: nn.Linear, packed: PackedLinear, frame: LowRank | None) -> LayerError:
    residual = base.weight.to(packed.scales.device, torch.float32)
    residual_error = _square(packed.unpacked(torch.float32) - residual)
    weight, weight_error = residual, residual_error
    if frame is not None:
        weight = residual + product(frame).to(residual.device)
        shape = (base.out_features, base.in_features)
        rounded = unpack(pack(weight, packed.packing), packed.packing, shape, torch.float32)
        weight_error = _square(rounded - weight)
    return LayerError(
        part=part,
        weight=_square(weight),
        residual=_square(residual),
        residual_error=residual_error,
        weight_error=weight_error,
        bytes_before=base.weight.nbytes,
        bytes_after=packed.nbytes,
    )


def _square(matrix: Tensor) -> float:
    """Return the squared Frobenius norm."""
    return float(torch.linalg.vector_norm(matrix.float())) ** 2


def _summed(part: Part, errors: list[LayerError]) -> PartError:
    weight = sum(error.weight for error in errors) or 1.0  # weights of zeros have no error

    def relative(squares: Iterable[float]) -> float:
        return math.sqrt(sum(squares) / weight)

    return PartError(
        part=part,
        layers=len(errors),
        residual_share=relative(error.residual for error in errors),
        residual_error=relative(error.residual_error for error in errors),
        weight_error=relative(error.weight_error for error in errors),
        bytes_before=sum(error.bytes_before for error in errors),
        bytes_after=sum(error.bytes_after for error in errors),
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
