"""The delta form: the formula that spectune trains, rebuilds and exports, and its gradients.

A frame (A0, B0) splits a weight into a low-rank part and the residual, W = B0 A0 + R (PiSSA: Meng, Wang and
Zhang 2024, arXiv 2404.02948). Training adds dA and dB to the two factors. Multiplied out,

    W' = R + (B0+dB) (A0+dA)             residual form: A = A0+dA and B = B0+dB are trained, R is fixed
       = R + B0 A0 + dB (A0+dA) + B0 dA
       = W + dB (A0+dA) + B0 dA          delta form: dA and dB are trained from zero, W is fixed
       = W + [dB, B0] [A0+dA; dA]        the change as one product of rank 2r

A frame with another alpha than its rank multiplies each product by scale = alpha / rank. For an input x, the
last line reads, with the joined factors J = [A0+dA; dA] and U = scale * [dB, B0],

    out = base(x) + h U^T,  h = x J^T

Plain autograd would compute gradients of the frame too. The functions here compute those of dA and dB alone,
and keep x and h. With the gradient g of out,

    g_h = g U = scale * [g dB, g B0]        dx = g_h J  [+ g W]
    d(dB) = scale * g^T x (A0+dA)^T = scale * g^T h[:, :r]
    d(dA) = scale * (g dB + g B0)^T x = scale * (g (B0+dB))^T x

The factors change once per optimizer step but are used in the forward pass, in its recomputation and in the
backward pass. They are therefore joined once per step, in the dtype of the activations, with B0+dB as a third
block of U, which makes d(dA) one product. The residual form has J = A and U = scale * B.
"""

# pyright: standard
# torch.autograd.Function and torch.nn.grad have no complete types.

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from spectune.core.low_rank import LowRank, product

# Devices whose torch.mm returns float32 for bf16 and fp16 factors: NVIDIA cards, with torch 2.8.
_HAS_MIXED_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype") and torch.version.hip is None
_MIXED_PRODUCTS = ("cuda", "meta") if _HAS_MIXED_PRODUCTS else ()


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


class Joined(NamedTuple):
    """The joined factors of one layer; `k` is 2 rank in the delta form and rank in the residual form."""

    down: Tensor  # J, (k, in) or (k, in, kh, kw)
    up: Tensor  # U, (out, 3 rank): scale * [dB, B0, B0+dB]; (out, rank) in the residual form: scale * B
    # Views, made once because a view costs the host as much as a launch.
    down_T: Tensor  # J^T of a linear layer, (in, k)
    up_T: Tensor  # the first k columns of U, transposed: (k, out)

    @classmethod
    def of(cls, down: Tensor, up: Tensor) -> Joined:
        """Return J and U with their transposed views."""
        return cls(down, up, down.flatten(1).T, up[:, : len(down)].T)


def join_delta(down: Tensor, up: Tensor, factors: Factors, scale: float) -> None:
    """Write J and U of N layers of one shape into `down` and `up`, each value rounded once.

    Args:
        down: J, (N, 2 rank, in, ...).
        up: U, (N, out, 3 rank).
        factors: The factors of all layers, with N as their first axis.
        scale: alpha / rank.
    """
    rank = factors.dA.shape[1]
    dB, B0 = factors.dB.flatten(2), factors.B0.flatten(2)
    torch.add(factors.A0, factors.dA, out=down[:, :rank])
    down[:, rank:].copy_(factors.dA)
    if scale == 1:
        up[:, :, :rank].copy_(dB)
        up[:, :, rank : 2 * rank].copy_(B0)
        torch.add(B0, dB, out=up[:, :, 2 * rank :])
    else:
        torch.mul(dB, scale, out=up[:, :, :rank])
        torch.mul(B0, scale, out=up[:, :, rank : 2 * rank])
        torch.mul(B0 + dB, scale, out=up[:, :, 2 * rank :])


def join_residual(down: Tensor, up: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """Write J = A and U = scale * B of N layers of one shape; see `join_delta`."""
    down.copy_(A)
    if scale == 1:
        up.copy_(B.flatten(2))
    else:
        torch.mul(B.flatten(2), scale, out=up)


@dataclass(frozen=True)
class Delta:
    """The result of training one layer: the frame (A0, B0), and the trained deltas dA and dB."""

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


def _use_weight(base: Any, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
    """Return a block in which the weight of a frozen linear layer is on the device of its input, in `dtype`.

    A layer that packs its weight or keeps it elsewhere has a method `use_weight` for it.
    """
    return base.use_weight(dtype) if hasattr(base, "use_weight") else nullcontext(base.weight)


class LinearChange(torch.autograd.Function):
    """x (..., in) through a frozen linear layer and its change; (..., out) in the dtype of x.

    The gradients of dA and dB have their dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: nn.Linear, scale: float, joined: Joined, dA: Tensor, dB: Tensor
    ) -> Tensor:
        hidden = x.reshape(-1, x.shape[-1]) @ joined.down_T  # (tokens, k)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        with _use_weight(base, x.dtype) as weight:
            # of x, not of its rows: for an x that is not contiguous, the two may round differently
            out = F.linear(x, weight, bias).contiguous()
        out.view(-1, out.shape[-1]).addmm_(hidden, joined.up_T)
        ctx.save_for_backward(x, hidden, joined.down, joined.up)
        ctx.base, ctx.scale, ctx.rank, ctx.dtype = base, scale, dA.shape[0], dA.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, hidden, down, up = ctx.saved_tensors
        rank, k = ctx.rank, down.shape[0]
        flat, g = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, up.shape[0])
        g_hidden = g @ up  # (tokens, 3 rank)
        needs_x, needs_down, needs_up = (ctx.needs_input_grad[i] for i in (0, 4, 5))
        dx = d_down = d_up = None
        if needs_x:
            with _use_weight(ctx.base, g.dtype) as weight:
                dx = g @ weight
            dx = dx.addmm_(g_hidden[:, :k], down).view_as(x)
        if needs_down:
            d_down = _product(g_hidden[:, -rank:].T, flat, ctx.dtype)  # (rank, in)
        if needs_up:
            d_up = _product(g.T, hidden[:, :rank], ctx.dtype)  # (out, rank)
            d_up = d_up if ctx.scale == 1 else d_up.mul_(ctx.scale)
        return dx, None, None, None, d_down, d_up


class ConvChange(torch.autograd.Function):
    """x (batch, in, h, w) through the change of a frozen convolution alone; (batch, out, h', w')."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: nn.Conv2d, scale: float, joined: Joined, dA: Tensor, dB: Tensor
    ) -> Tensor:
        hidden = F.conv2d(x, joined.down, None, base.stride, base.padding, base.dilation)
        out = F.conv2d(hidden, joined.up[:, : hidden.shape[1], None, None])
        ctx.save_for_backward(x, hidden, joined.down, joined.up)
        ctx.base, ctx.scale, ctx.shapes, ctx.dtype = base, scale, (dA.shape, dB.shape), dA.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, hidden, down, up = ctx.saved_tensors
        base, g = ctx.base, gradients[0]
        where = (base.stride, base.padding, base.dilation)
        rank, k = ctx.shapes[0][0], down.shape[0]
        g_hidden = up.T.expand(len(x), -1, -1) @ g.flatten(2)
        g_hidden = g_hidden.view(len(x), -1, *g.shape[2:])  # (batch, 3 rank, h', w')
        needs_x, needs_down, needs_up = (ctx.needs_input_grad[i] for i in (0, 4, 5))
        dx = d_down = d_up = None
        if needs_x:
            dx = conv2d_input(x.shape, down, g_hidden[:, :k], *where)
        if needs_down:
            d_down = conv2d_weight(x, ctx.shapes[0], g_hidden[:, -rank:], *where).to(ctx.dtype)
        if needs_up:
            one, other = (t.transpose(0, 1).flatten(1) for t in (g, hidden[:, :rank]))  # (channels, pixels)
            d_up = _product(one, other.T, ctx.dtype)
            d_up = (d_up if ctx.scale == 1 else d_up.mul_(ctx.scale)).view(ctx.shapes[1])
        return dx, None, None, None, d_down, d_up


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in `dtype`, without rounding the sums to a narrower dtype first."""
    if a.dtype == dtype:
        return a @ b
    if dtype == torch.float32 and a.device.type in _MIXED_PRODUCTS:
        return torch.mm(a, b, out_dtype=dtype)  # one launch: the products are summed in float32 anyway
    return a.to(dtype) @ b.to(dtype)


def delta_linear(
    x: Tensor, base: nn.Linear, scale: float, joined: Joined, trained: tuple[Tensor, Tensor]
) -> Tensor:
    """Return base(x) plus the change of a linear layer; `trained` is (dA, dB)."""
    return LinearChange.apply(x, base, scale, joined, *trained)  # pyright: ignore[reportReturnType]


def delta_conv(
    x: Tensor, base: nn.Conv2d, scale: float, joined: Joined, trained: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the change alone of a convolution of one group that pads with zeros."""
    return ConvChange.apply(x, base, scale, joined, *trained)  # pyright: ignore[reportReturnType]


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
