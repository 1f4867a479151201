"""Frozen linear layers in 4 or 8 bits, quantised by bitsandbytes, and what of the weights that costs.

Only the weights are quantised: a product unpacks them into the type of its input and multiplies there, so
that inputs and gradients stay as they are. Backwards they are unpacked once more instead of being kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectune.core.low_rank import LowRank, product
from spectune.errors import InputError, SpectuneError
from spectune.model.inject import AdaptedLayer
from spectune.model.network import Sdxl
from spectune.sdxl.names import Part, modules_of

Kind = Literal["nf4", "int8"]
NF4_BLOCK = 64  # numbers that share a scale; Dettmers et al. 2023, QLoRA


@dataclass(frozen=True)
class Packed:
    """A quantised matrix (out, in)."""

    codes: Tensor  # nf4: uint8, two numbers each, in storage order; int8: (out, in)
    scales: Tensor  # float32, the largest magnitude of each block of 64 (nf4) or of each row (int8)


def quantise(weight: Tensor, kind: Kind) -> Packed:
    """A matrix (out, in) in 4-bit normal floats, or in 8-bit whole numbers; `dequantise` is the inverse.

    Raises SpectuneError where bitsandbytes is not installed.
    """
    bnb = _bitsandbytes()
    weight = weight.detach().contiguous()
    if kind == "nf4":
        if weight.dtype == torch.float64:
            weight = weight.float()
        codes, state = bnb.quantize_4bit(
            weight, blocksize=NF4_BLOCK, quant_type=kind, compress_statistics=False
        )
        return Packed(codes, state.absmax)
    # float16: the only type that the kernel takes on every device; it holds 11 bits, of which 8 are kept
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    return Packed(codes, scales)


def dequantise(packed: Packed, kind: Kind, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) that `packed` stands for."""
    bnb = _bitsandbytes()
    if kind == "int8":
        return bnb.int8_vectorwise_dequant(packed.codes, packed.scales).to(dtype)
    # bitsandbytes unpacks 4 bits into 16 or 32
    direct = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    state = bnb.QuantState(
        absmax=packed.scales, shape=torch.Size(shape), dtype=direct, blocksize=NF4_BLOCK, quant_type=kind
    )
    return bnb.dequantize_4bit(packed.codes, state).to(dtype)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise SpectuneError(
            "weights in nf4 or int8 need bitsandbytes, which is not installed",
            hint="pip install 'spectune[bnb]'",
        ) from error
    return functional


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept quantised; it answers in the type of its input."""

    codes: nn.Parameter
    scales: nn.Parameter

    def __init__(self, base: nn.Linear, kind: Kind, device: torch.device | None = None) -> None:
        # not Linear's own: it would allocate the weight that is to be saved
        nn.Module.__init__(self)
        device = device or base.weight.device
        self.out_features, self.in_features = base.out_features, base.in_features
        self.kind: Kind = kind
        self.dtype = base.weight.dtype
        packed = quantise(base.weight.to(device), kind)
        # parameters and not buffers: several processes would send each other buffers at every step
        self.codes = nn.Parameter(packed.codes, requires_grad=False)
        self.scales = nn.Parameter(packed.scales, requires_grad=False)
        bias = None if base.bias is None else nn.Parameter(base.bias.detach().to(device), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight (out, in) unpacked, in the type that it had; a new tensor each time."""
        return self.unpacked(self.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in `dtype`."""
        packed = Packed(self.codes, self.scales)
        return dequantise(packed, self.kind, (self.out_features, self.in_features), dtype)

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self)  # pyright: ignore[reportReturnType]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is kept."""
        return self.codes.nbytes + self.scales.nbytes

    def _apply(self, fn: Any, recurse: bool = True) -> QuantisedLinear:
        scales = self.scales.detach()
        super()._apply(fn, recurse)
        # a change of type is for the bias: scales rounded to 16 bits would be off by up to 0.4 % for good
        self.scales = nn.Parameter(scales.to(self.codes.device), requires_grad=False)
        return self


class _Product(torch.autograd.Function):
    """x (..., in) W^T + bias -> (..., out), with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        weight, flat = layer.unpacked(x.dtype), x.reshape(-1, layer.in_features)
        # made here and not by F.linear, whose answer can be a view: adapters add to it in place
        out = x.new_empty(*x.shape[:-1], layer.out_features)
        rows = out.view(-1, layer.out_features)
        if layer.bias is None:
            torch.mm(flat, weight.T, out=rows)
        else:
            torch.addmm(layer.bias.to(x.dtype), flat, weight.T, out=rows)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        g = gradients[0]
        return g @ ctx.layer.unpacked(g.dtype), None


# ---------------------------------------------------------------- a whole model


@dataclass(frozen=True)
class LayerError:
    """What quantising one layer lost; norms are Frobenius norms, squared, so that they add up."""

    part: Part
    weight: float  # of W, the weight with its principal part
    left: float  # of R, what was quantised; W itself where nothing stands beside it
    left_error: float  # of Q(R) - R
    weight_error: float  # of Q(W) - W, had W been quantised
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class PartError:
    """What quantising the layers of one part lost, relative to the norm of their weights W."""

    part: Part
    layers: int
    residual_share: float  # |R| / |W|
    residual_error: float  # |Q(R) - R| / |W|: by how much the model's weights are off
    weight_error: float  # |Q(W) - W| / |W|: by how much they would be, had W been quantised
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"{self.part}: {self.layers} linear layers, {_megabytes(self.bytes_before)} -> "
            f"{_megabytes(self.bytes_after)}, weights off by {self.residual_error:.2%} "
            f"({self.weight_error:.2%} without the residual form)"
        )


@dataclass(frozen=True)
class QuantisationReport:
    """What quantising a model saved and lost."""

    kind: Kind
    layers: Mapping[str, LayerError]  # by layer name

    @property
    def parts(self) -> tuple[PartError, ...]:
        """UNet, first and second encoder, as far as layers of them are quantised."""
        found = {part: [e for e in self.layers.values() if e.part is part] for part in Part}
        return tuple(_summed(part, errors) for part, errors in found.items() if errors)


def quantise_layers(
    model: Sdxl,
    names: Iterable[str] | None,
    kind: Kind,
    *,
    frames: Mapping[str, LowRank] | None = None,
    device: torch.device | None = None,
) -> QuantisationReport:
    """Quantise linear layers of UNet and encoders in place; None is those of `linear_layers`.

    Under an adapted layer its base is quantised. `frames` are the principal parts that stand beside a
    residual: what quantising the whole weight would have lost is measured with them. Weights are quantised on
    `device` and stay there; None is where they are. Convolutions, norms and embeddings stay as they are.
    Raises InputError for a named layer that is not linear, or quantised already.
    """
    chosen = linear_layers(model) if names is None else list(names)
    frames = frames or {}
    return QuantisationReport(
        kind, {name: _quantise_layer(model, name, kind, frames.get(name), device) for name in chosen}
    )


def linear_layers(model: Sdxl) -> list[str]:
    """The linear layers that are factored by default, in the order of the catalogue.

    Of a model with adapters, encoders without any are left out: no principal stands beside their weights, and
    rounding those whole falsifies captions by far more (docs/reference/small-cards.md).
    """
    parts = _adapted_parts(model)
    return [
        name
        for part, name in _factored(model)
        if isinstance(_holder(model, name).layer, nn.Linear)
        and (not parts or part in parts or part is Part.UNET)
    ]


def _factored(model: Sdxl) -> list[tuple[Part, str]]:
    return [
        (part, module.layer)
        for part in Part
        for module in modules_of(model.layout, part.value)
        if module.default
    ]


def _adapted_parts(model: Sdxl) -> set[Part]:
    roots = {Part.UNET: model.unet, Part.TE1: model.te1, Part.TE2: model.te2}
    return {part for part, root in roots.items() if any(isinstance(m, AdaptedLayer) for m in root.modules())}


@dataclass(frozen=True)
class _Holder:
    """Where a layer stands: the base of an adapted layer, or an attribute of a module of the model."""

    parent: nn.Module
    attribute: str

    @property
    def layer(self) -> nn.Module:
        return getattr(self.parent, self.attribute)


def _holder(model: Sdxl, name: str) -> _Holder:
    holder = _Holder(*model.place(name))
    return _Holder(holder.layer, "base") if isinstance(holder.layer, AdaptedLayer) else holder


@torch.no_grad()
def _quantise_layer(
    model: Sdxl, name: str, kind: Kind, frame: LowRank | None, device: torch.device | None
) -> LayerError:
    holder = _holder(model, name)
    base = holder.layer
    if isinstance(base, QuantisedLinear):
        raise InputError(f"{name} is quantised already")
    if not isinstance(base, nn.Linear):
        raise InputError(f"{name} is a {type(base).__name__}: only linear layers are quantised")
    quantised = QuantisedLinear(base, kind, device)
    error = _measured(Part(name.partition(".")[0]), base, quantised, frame)
    setattr(holder.parent, holder.attribute, quantised)
    return error


def _measured(part: Part, base: nn.Linear, quantised: QuantisedLinear, frame: LowRank | None) -> LayerError:
    left = base.weight.to(quantised.codes.device, torch.float32)
    left_error = _square(quantised.unpacked(torch.float32) - left)
    weight, weight_error = left, left_error
    if frame is not None:
        weight = left + product(frame).to(left.device)
        shape = (base.out_features, base.in_features)
        again = dequantise(quantise(weight, quantised.kind), quantised.kind, shape, torch.float32)
        weight_error = _square(again - weight)
    return LayerError(
        part=part,
        weight=_square(weight),
        left=_square(left),
        left_error=left_error,
        weight_error=weight_error,
        bytes_before=base.weight.nbytes,
        bytes_after=quantised.nbytes,
    )


def _square(matrix: Tensor) -> float:
    """The squared Frobenius norm."""
    return float(torch.linalg.vector_norm(matrix.float())) ** 2


def _summed(part: Part, errors: list[LayerError]) -> PartError:
    weight = sum(error.weight for error in errors) or 1.0  # all zeros: nothing is off
    return PartError(
        part=part,
        layers=len(errors),
        residual_share=math.sqrt(sum(error.left for error in errors) / weight),
        residual_error=math.sqrt(sum(error.left_error for error in errors) / weight),
        weight_error=math.sqrt(sum(error.weight_error for error in errors) / weight),
        bytes_before=sum(error.bytes_before for error in errors),
        bytes_after=sum(error.bytes_after for error in errors),
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
