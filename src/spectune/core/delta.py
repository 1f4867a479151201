"""The delta form: the formula that spectune trains, rebuilds and exports, and its gradients.

A frame (A0, B0) splits a weight into a low-rank part and the residual, W = B0 A0 + R (PiSSA: Meng, Wang and
Zhang 2024, arXiv 2404.02948). Training adds dA and dB to the two factors. Multiplied out,

    W' = R + (B0+dB) (A0+dA)             residual form: A = A0+dA and B = B0+dB are trained, R is fixed
       = R + B0 A0 + dB (A0+dA) + B0 dA
       = W + dB (A0+dA) + B0 dA          delta form: dA and dB are trained from zero, W is fixed
       = W + [dB, B0] [A0+dA; dA]        the change as one product of rank 2r

A frame with another alpha than its rank multiplies each product by scale = alpha / rank. `stacked_down` and
`stacked_up` are the factors of the last line. For an input x, that line reads

    out = base(x) + scale * h [dB, B0]^T,  h = x [A0+dA; dA]^T

Plain autograd would keep all of h and compute gradients of the frame. The functions here keep x and the first
half of h, and compute gradients of dA and dB alone. With the gradient g of out,

    g1 = g dB,  g2 = g B0,  h1 = x (A0+dA)^T       (times scale)
    d(dB) = g^T h1        d(dA) = (g1 + g2)^T x        dx = g1 (A0+dA) + g2 dA  [+ g W]
"""

# pyright: standard
# torch.autograd.Function and torch.nn.grad have no complete types.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from spectune.core.low_rank import LowRank, product


class Factors(NamedTuple):
    """The frame (A0, B0) and the delta (dA, dB) of one layer, in the shapes of its weight."""

    A0: Tensor  # (rank, in) or (rank, in, kh, kw)
    B0: Tensor  # (out, rank) or (out, rank, 1, 1)
    dA: Tensor
    dB: Tensor


def stacked_down(factors: Factors, dtype: torch.dtype) -> Tensor:
    """Return [A0+dA; dA] of shape (2 rank, in, ...); adds before the cast to `dtype`."""
    return torch.cat([(factors.A0 + factors.dA).to(dtype), factors.dA.to(dtype)])


def stacked_up(factors: Factors, scale: float, dtype: torch.dtype) -> Tensor:
    """Return scale * [dB, B0] of shape (out, 2 rank, ...)."""
    stacked = torch.cat([factors.dB.to(dtype), factors.B0.to(dtype)], dim=1)
    return stacked if scale == 1 else stacked * scale


@dataclass(frozen=True)
class Delta:
    """The result of training one layer: a frame, and the deltas of its factors."""

    frame: LowRank  # A0 and B0
    down: Tensor  # dA, same shape as frame.down
    up: Tensor  # dB, same shape as frame.up

    def factors(self) -> Factors:
        """Return the four tensors in float32."""
        frame = self.frame
        return Factors(frame.down.float(), frame.up.float(), self.down.float(), self.up.float())


def added_to_base(layer: LowRank | Delta) -> LowRank:
    """Return W' - W as one pair: a delta as [dB, B0] [A0+dA; dA] in float32, a low-rank layer unchanged."""
    if isinstance(layer, LowRank):
        return layer
    factors = layer.factors()
    down, up = stacked_down(factors, torch.float32), stacked_up(factors, 1.0, torch.float32)
    return LowRank(down=down, up=up, alpha=layer.frame.scale * down.shape[0])


def added_to_residual(layer: LowRank | Delta) -> LowRank:
    """Return W' - R as one pair: a delta as (B0+dB) (A0+dA) in float32, a low-rank layer unchanged."""
    if isinstance(layer, LowRank):
        return layer
    factors = layer.factors()
    return LowRank(down=factors.A0 + factors.dA, up=factors.B0 + factors.dB, alpha=layer.frame.alpha)


def delta_between(frame: LowRank, tuned: LowRank) -> Delta:
    """Return dA = A - A0 and dB = B - B0 in float32; the inverse of `added_to_residual`."""
    down, up = tuned.down.float() - frame.down.float(), tuned.up.float() - frame.up.float()
    return Delta(frame=frame, down=down, up=up)


def change(layer: LowRank | Delta) -> Tensor:
    """Return W' - W in float32, in the shape of the weight."""
    return product(added_to_base(layer))


class LinearChange(torch.autograd.Function):
    """x (..., in) through a frozen linear layer and its change; (..., out) in the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, *tensors: Tensor
    ) -> Tensor:
        factors = Factors(*tensors)
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        hidden = flat @ stacked_down(factors, x.dtype).T  # (tokens, 2 rank)
        # of x, not of `flat`: for an x that is not contiguous, the two may round differently
        out = F.linear(x, weight, bias).contiguous()
        out.view(-1, out.shape[-1]).addmm_(hidden, stacked_up(factors, scale, x.dtype).T)
        rank = factors.dA.shape[0]
        ctx.save_for_backward(x, hidden[:, :rank].clone(), weight, *tensors)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, first, weight, *tensors = ctx.saved_tensors
        factors, rank = Factors(*tensors), first.shape[1]
        flat, g = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, weight.shape[0])
        g_hidden = g @ stacked_up(factors, ctx.scale, x.dtype)  # (tokens, 2 rank)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ weight).addmm_(g_hidden, stacked_down(factors, x.dtype)).view_as(x)
        d_up = g.T @ first  # (out, rank)
        d_up = d_up if ctx.scale == 1 else d_up * ctx.scale
        d_down = (g_hidden[:, :rank] + g_hidden[:, rank:]).T @ flat  # (rank, in)
        return dx, None, None, None, None, None, d_down.to(factors.dA.dtype), d_up.to(factors.dB.dtype)


class ConvChange(torch.autograd.Function):
    """x (batch, in, h, w) through the change of a frozen convolution alone; (batch, out, h', w')."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Conv2d, scale: float, *tensors: Tensor) -> Tensor:
        factors = Factors(*tensors)
        hidden = F.conv2d(x, stacked_down(factors, x.dtype), None, base.stride, base.padding, base.dilation)
        out = F.conv2d(hidden, stacked_up(factors, scale, x.dtype))
        ctx.save_for_backward(x, hidden[:, : factors.dA.shape[0]].clone(), *tensors)
        ctx.base, ctx.scale = base, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, first, *tensors = ctx.saved_tensors
        factors, base, g = Factors(*tensors), ctx.base, gradients[0]
        dA, dB = factors.dA, factors.dB
        rank, where = dA.shape[0], (base.stride, base.padding, base.dilation)
        up = stacked_up(factors, ctx.scale, x.dtype)
        g_hidden = F.conv2d(g, up.transpose(0, 1).contiguous())  # (batch, 2 rank, h', w')
        dx = None
        if ctx.needs_input_grad[0]:
            dx = conv2d_input(x.shape, stacked_down(factors, x.dtype), g_hidden, *where)
        d_up = torch.einsum("bohw,brhw->or", g, first)
        d_up = d_up if ctx.scale == 1 else d_up * ctx.scale
        d_down = conv2d_weight(x, dA.shape, g_hidden[:, :rank] + g_hidden[:, rank:], *where)
        return dx, None, None, None, None, d_down.to(dA.dtype), d_up.view_as(dB).to(dB.dtype)


def delta_linear(x: Tensor, base: nn.Linear, scale: float, factors: Factors) -> Tensor:
    """Return base(x) plus the change of a linear layer."""
    return LinearChange.apply(x, base.weight, base.bias, scale, *factors)  # pyright: ignore[reportReturnType]


def delta_conv(x: Tensor, base: nn.Conv2d, scale: float, factors: Factors) -> Tensor:
    """Return the change alone of a convolution of one group that pads with zeros."""
    return ConvChange.apply(x, base, scale, *factors)  # pyright: ignore[reportReturnType]


def apply_low_rank(
    x: Tensor, base: nn.Module, down: Tensor, up: Tensor, *, dropout: float = 0.0, halves: int = 1
) -> Tensor:
    """Return up (down x) with plain autograd; `dropout` drops directions independently at each position.

    Stacked factors have two `halves`. A direction is dropped in both halves or in none.
    """
    if isinstance(base, nn.Conv2d):
        hidden = F.conv2d(x, down, None, base.stride, base.padding, base.dilation)
        return F.conv2d(_dropped(hidden, dropout, 1, halves), up)
    return F.linear(_dropped(F.linear(x, down), dropout, -1, halves), up)


def _dropped(hidden: Tensor, probability: float, axis: int, halves: int) -> Tensor:
    if not probability:
        return hidden
    half = hidden.narrow(axis, 0, hidden.shape[axis] // halves)
    kept = F.dropout(torch.ones_like(half), probability, training=True)
    return hidden * torch.cat([kept] * halves, dim=axis)
