"""A frozen linear layer with a weight that bitsandbytes packs into 4 or 8 bits.

Only the weight is quantized. It is unpacked to the dtype of the input for each product, so inputs and
gradients keep their precision.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectune.extras import extras_named
from spectune.model.frozen_linear import FrozenLinear
from spectune.model.weight_stream import StreamedTensor, WeightStream

Packing = Literal["nf4", "int8"]
NF4_BLOCK = 64  # weights that share a scale; Dettmers et al. 2023, QLoRA
INT8_LARGEST = 127  # the code of the largest magnitude of a row


@dataclass(frozen=True)
class Packed:
    """A matrix of shape (out, in) stored as integer codes of 4 or 8 bits, with their scales."""

    codes: Tensor  # nf4: uint8 with two weights each, in storage order; int8: (out, in)
    scales: Tensor  # float32, the largest magnitude of each block of 64 (nf4) or of each row (int8)


def pack(weight: Tensor, packing: Packing) -> Packed:
    """Quantize a matrix (out, in) to 4-bit normal floats or 8-bit integers. Inverse: unpack.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    bnb = _bitsandbytes()
    weight = weight.detach().contiguous()
    if packing == "nf4":
        if weight.dtype == torch.float64:
            weight = weight.float()
        codes, state = bnb.quantize_4bit(
            weight, blocksize=NF4_BLOCK, quant_type=packing, compress_statistics=False
        )
        return Packed(codes, state.absmax)
    # float16: the only dtype that the kernel supports on every device; its 11 bits are enough for int8
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    return Packed(codes, scales)


def unpack(packed: Packed, packing: Packing, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the matrix (out, in) of `packed` in `dtype`."""
    if packing == "int8":
        # one kernel, which multiplies in float32: bitsandbytes makes two float32 copies of the matrix
        scales = packed.scales.view(-1, 1) / INT8_LARGEST
        return torch.mul(packed.codes, scales, out=scales.new_empty(shape, dtype=dtype))
    bnb = _bitsandbytes()
    # bitsandbytes unpacks 4 bits to 16-bit or 32-bit floats
    direct = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    state = bnb.QuantState(
        absmax=packed.scales, shape=torch.Size(shape), dtype=direct, blocksize=NF4_BLOCK, quant_type=packing
    )
    return bnb.dequantize_4bit(packed.codes, state).to(dtype)


def _bitsandbytes() -> Any:
    with extras_named("a weight in nf4 or int8"):
        import bitsandbytes.functional as functional
    return functional


class PackedLinear(FrozenLinear):
    """A frozen linear layer with a packed weight. The output has the dtype of the input."""

    codes: nn.Parameter | StreamedTensor  # the latter after `stream`
    scales: nn.Parameter

    def __init__(self, base: nn.Linear, packing: Packing, device: torch.device | None = None) -> None:
        # nn.Linear.__init__ would allocate the full weight
        nn.Module.__init__(self)
        device = device or base.weight.device
        self.out_features, self.in_features = base.out_features, base.in_features
        self.packing: Packing = packing
        self.dtype = base.weight.dtype
        packed = pack(base.weight.to(device), packing)
        # parameters, because distributed training would broadcast buffers at every step
        self.codes = nn.Parameter(packed.codes, requires_grad=False)
        self.scales = nn.Parameter(packed.scales, requires_grad=False)
        bias = None if base.bias is None else nn.Parameter(base.bias.detach().to(device), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The unpacked weight (out, in) in its original dtype, computed at each access."""
        return self.unpacked(self.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) in `dtype`."""
        with self.use_weight(dtype) as weight:
            return weight

    def use_weight(self, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        """Return a block with the weight (out, in), unpacked for it in `dtype`."""
        if isinstance(self.codes, StreamedTensor):
            with self.codes.on_device() as codes:
                return nullcontext(self._unpack(codes, dtype))
        return nullcontext(self._unpack(self.codes, dtype))

    def _unpack(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        shape = (self.out_features, self.in_features)
        return unpack(Packed(codes, self.scales), self.packing, shape, dtype)

    def stream(self, stream: WeightStream) -> None:
        """Move the codes to main memory and copy them to the device for each use; the scales stay there."""
        assert isinstance(self.codes, nn.Parameter)
        codes = self.codes.detach()
        del self.codes  # a parameter would move with the model
        self.codes = stream.add(codes)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return self.codes.nbytes + self.scales.nbytes

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        scales = self.scales.detach()
        super()._apply(fn, recurse)
        # scales keep float32: rounding them to 16 bits would cause an error of up to 0.4 %
        self.scales = nn.Parameter(scales.to(self.scales.device), requires_grad=False)
        return self
