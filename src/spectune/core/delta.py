"""The change of one layer in the delta form, with its gradients written out.

out = base(x) + scale * ((x (A0+dA)^T) dB^T + (x dA^T) B0^T), computed as one product of rank 2r. Plain
autograd would keep both halves of the hidden numbers and form the gradients of the frame, which nobody wants;
here x and one half are kept, and only dA and dB get gradients:

    g = out's gradient,  g1 = g dB,  g2 = g B0,  h1 = x (A0+dA)^T
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
    """The frame (A0, B0) and what is trained (dA, dB) of one layer, in the shapes of its weight."""

    frame_down: Tensor  # (rank, in) or (rank, in, kh, kw)
    frame_up: Tensor  # (out, rank) or (out, rank, 1, 1)
    down: Tensor
    up: Tensor


def joined_down(factors: Factors, dtype: torch.dtype) -> Tensor:
    """[A0+dA; dA], (2 rank, in, ...): summed in the type of the trained tensors, then cast."""
    return torch.cat([(factors.frame_down + factors.down).to(dtype), factors.down.to(dtype)])


def joined_up(factors: Factors, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * [dB, B0], (out, 2 rank, ...)."""
    joined = torch.cat([factors.up.to(dtype), factors.frame_up.to(dtype)], dim=1)
    return joined if scale == 1 else joined * scale


@dataclass(frozen=True)
class Delta:
    """What training added to a frame: W' = W + scale * (up @ (frame.down + down) + frame.up @ down)."""

    frame: LowRank
    down: Tensor  # same shape as frame.down
    up: Tensor  # same shape as frame.up


def joined(delta: Delta) -> LowRank:
    """The change of a tuned layer as one pair of rank 2r in float32: [dB, B0] [A0+dA; dA]."""
    frame = delta.frame
    change_down, change_up = delta.down.float(), delta.up.float()
    down = torch.cat([frame.down.float() + change_down, change_down])  # (2 rank, in, ...)
    up = torch.cat([change_up, frame.up.float()], dim=1)  # (out, 2 rank, ...)
    return LowRank(down=down, up=up, alpha=frame.scale * down.shape[0])


def absolute(delta: Delta) -> LowRank:
    """The tuned factors themselves in float32, (B0+dB) and (A0+dA): what stands beside the residual."""
    frame = delta.frame
    down = frame.down.float() + delta.down.float()
    up = frame.up.float() + delta.up.float()
    return LowRank(down=down, up=up, alpha=frame.alpha)


def change(layer: LowRank | Delta) -> Tensor:
    """What an adapter adds to the weight of one layer, in float32 and in the shape of the weight."""
    return product(joined(layer) if isinstance(layer, Delta) else layer)


class LinearChange(torch.autograd.Function):
    """x (..., in) through a frozen linear layer and its change; (..., out) in the type of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, *factors: Tensor
    ) -> Tensor:
        four = Factors(*factors)
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        hidden = flat @ joined_down(four, x.dtype).T  # (tokens, 2 rank)
        # of x and not of `flat`: where x is not contiguous, the two may round differently
        out = F.linear(x, weight, bias).contiguous()
        out.view(-1, out.shape[-1]).addmm_(hidden, joined_up(four, scale, x.dtype).T)
        rank = four.down.shape[0]
        ctx.save_for_backward(x, hidden[:, :rank].clone(), weight, *factors)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, first, weight, *factors = ctx.saved_tensors
        four, rank = Factors(*factors), first.shape[1]
        flat, g = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, weight.shape[0])
        g_hidden = g @ joined_up(four, ctx.scale, x.dtype)  # (tokens, 2 rank)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ weight).addmm_(g_hidden, joined_down(four, x.dtype)).view_as(x)
        d_up = g.T @ first  # (out, rank)
        d_up = d_up if ctx.scale == 1 else d_up * ctx.scale
        d_down = (g_hidden[:, :rank] + g_hidden[:, rank:]).T @ flat  # (rank, in)
        return dx, None, None, None, None, None, d_down.to(four.down.dtype), d_up.to(four.up.dtype)


class ConvChange(torch.autograd.Function):
    """x (batch, in, h, w) through the change of a frozen convolution alone; (batch, out, h', w')."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Conv2d, scale: float, *factors: Tensor) -> Tensor:
        four = Factors(*factors)
        hidden = F.conv2d(x, joined_down(four, x.dtype), None, base.stride, base.padding, base.dilation)
        out = F.conv2d(hidden, joined_up(four, scale, x.dtype))
        ctx.save_for_backward(x, hidden[:, : four.down.shape[0]].clone(), *factors)
        ctx.base, ctx.scale = base, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, first, *factors = ctx.saved_tensors
        four, base, g = Factors(*factors), ctx.base, gradients[0]
        rank, where = four.down.shape[0], (base.stride, base.padding, base.dilation)
        up = joined_up(four, ctx.scale, x.dtype)
        g_hidden = F.conv2d(g, up.transpose(0, 1).contiguous())  # (batch, 2 rank, h', w')
        dx = None
        if ctx.needs_input_grad[0]:
            dx = conv2d_input(x.shape, joined_down(four, x.dtype), g_hidden, *where)
        d_up = torch.einsum("bohw,brhw->or", g, first)
        d_up = d_up if ctx.scale == 1 else d_up * ctx.scale
        both = g_hidden[:, :rank] + g_hidden[:, rank:]
        d_down = conv2d_weight(x, four.down.shape, both, *where)
        return dx, None, None, None, None, d_down.to(four.down.dtype), d_up.view_as(four.up).to(four.up.dtype)


def delta_linear(x: Tensor, base: nn.Linear, scale: float, factors: Factors) -> Tensor:
    """base(x) plus its change."""
    return LinearChange.apply(x, base.weight, base.bias, scale, *factors)  # pyright: ignore[reportReturnType]


def delta_conv(x: Tensor, base: nn.Conv2d, scale: float, factors: Factors) -> Tensor:
    """The change of a convolution of one group that pads with zeros."""
    return ConvChange.apply(x, base, scale, *factors)  # pyright: ignore[reportReturnType]


def low_rank(
    x: Tensor, base: nn.Module, down: Tensor, up: Tensor, *, dropout: float = 0.0, halves: int = 1
) -> Tensor:
    """up (down x) by plain autograd; with `dropout`, directions are left out position by position.

    Joined factors have two `halves`, in which a direction stays or goes as a whole.
    """
    if isinstance(base, nn.Conv2d):
        hidden = F.conv2d(x, down, None, base.stride, base.padding, base.dilation)
        return F.conv2d(_dropped(hidden, dropout, 1, halves), up)
    return F.linear(_dropped(F.linear(x, down), dropout, -1, halves), up)


def _dropped(hidden: Tensor, probability: float, axis: int, halves: int) -> Tensor:
    if not probability:
        return hidden
    one = hidden.narrow(axis, 0, hidden.shape[axis] // halves)
    kept = F.dropout(torch.ones_like(one), probability, training=True)
    return hidden * torch.cat([kept] * halves, dim=axis)
