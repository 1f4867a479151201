"""Frozen layers whose weights stay in main memory and are streamed to the GPU for each product."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from spectune.model.frozen_linear import FrozenLinear
from spectune.model.network import Sdxl
from spectune.model.packed_linear import PackedLinear
from spectune.model.weight_stream import WeightStream


class StreamedLinear(FrozenLinear):
    """A frozen linear layer with a streamed weight."""

    def __init__(self, base: nn.Linear, stream: WeightStream) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate the weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.bias = base.bias
        self.streamed = stream.add(base.weight.detach())

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight (out, in), in main memory."""
        return self.streamed.stored

    def use_weight(self, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        """Return a block with the weight (out, in) on the device."""
        return self.streamed.on_device()


class StreamedConv2d(nn.Conv2d):
    """A frozen convolution with a streamed weight."""

    def __init__(self, base: nn.Conv2d, stream: WeightStream) -> None:
        nn.Module.__init__(self)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(base, name))
        assert base.padding_mode == "zeros"
        self.padding_mode = base.padding_mode
        self.bias = base.bias
        self.streamed = stream.add(base.weight.detach())

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight (out, in / groups, kh, kw), in main memory."""
        return self.streamed.stored

    def forward(self, input: Tensor) -> Tensor:
        return _Convolution.apply(input, self)  # pyright: ignore[reportReturnType]


class _Convolution(torch.autograd.Function):
    """The convolution of x (batch, in, h, w), with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: StreamedConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        with layer.streamed.on_device() as weight:
            return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer: Any = ctx.layer  # torch.nn.grad is typed for single integers
        with layer.streamed.on_device() as weight:
            where = (layer.stride, layer.padding, layer.dilation, layer.groups)
            return conv2d_input(ctx.shape, weight, gradients[0], *where), None


def stream_weights(model: Sdxl, device: torch.device) -> WeightStream:
    """Move the weights of all `large_layers` to main memory, and return the stream that copies them back.

    Quantized weights stay in 4 or 8 bits. All other tensors move to the device with the model.
    """
    stream = WeightStream(device)
    for network in (model.unet, model.te1, model.te2):
        for parent, name in large_layers(network):
            layer = getattr(parent, name)  # one at a time: the original weight is freed when it is replaced
            if isinstance(layer, PackedLinear):
                layer.stream(stream)
            elif isinstance(layer, nn.Linear):
                setattr(parent, name, StreamedLinear(layer, stream))
            else:
                setattr(parent, name, StreamedConv2d(layer, stream))
    model.unet.register_forward_pre_hook(lambda *_: stream.start_pass())
    return stream


def large_layers(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return parent and attribute of the linear layers and convolutions in the blocks of a network.

    A text encoder that is not trained has none: it is not needed once the captions are cached. The first and
    last layers and the time embedding of the UNet are excluded, because a warm start replaces them.
    """
    if isinstance(network, UNet2DConditionModel):
        blocks = [network.down_blocks, network.mid_block, network.up_blocks]
    else:
        blocks = [network] if any(tensor.requires_grad for tensor in network.parameters()) else []
    return [
        (parent, name)
        for block in blocks
        for parent in block.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear | nn.Conv2d)
    ]
