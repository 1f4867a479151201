"""A frozen linear layer that has its weight on the device only while a product uses it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenLinear(nn.Linear):
    """The base of linear layers with a packed or streamed weight.

    The backward pass gets the weight again instead of keeping it.
    """

    def use_weight(self, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        """Return a block in which the weight (out, in) is on the device, in `dtype`."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self)  # pyright: ignore[reportReturnType]


class _Product(torch.autograd.Function):
    """The product x (..., in) W^T + bias -> (..., out), with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        with layer.use_weight(x.dtype) as weight:
            out = F.linear(x, weight, bias).contiguous()
        # It can be a view, but adapters add to the output in place.
        return torch.ops.aten._unsafe_view(out, out.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        g = gradients[0]
        with ctx.layer.use_weight(g.dtype) as weight:
            return g @ weight, None
