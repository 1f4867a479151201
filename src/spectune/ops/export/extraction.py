"""Express a change of a weight as deltas of a given frame, so that training can continue from it.

With the frame (A0, B0) and the change D, the tuned factors are the best approximation of rank r,

    (B0+dB) (A0+dA) ~= B0 A0 + D

A truncated SVD gives factors B, A of it. They are only determined up to B Q, Q^T A for an orthogonal matrix
Q, which does not change the product. Q is chosen so that the deltas are small: it minimizes

    |B Q - B0|^2 + |Q^T A - A0|^2    (orthogonal Procrustes: Schoenemann 1966)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.core.delta import Delta, change
from spectune.core.linalg import norm, thin_qr, thin_svd
from spectune.core.lora import ExportedLayer
from spectune.core.low_rank import LowRank, to_factors, to_matrix
from spectune.core.svd import top_singular

# The SVD is in float32 and may be a sketch. Each iteration in float64 squares the error of the subspace.
_ITERATIONS = 2


@dataclass(frozen=True)
class Extracted:
    """The deltas of one layer, and their report."""

    delta: Delta
    report: ExportedLayer


def extract_delta(
    frame: LowRank, wanted: Tensor, *, name: str = "layer", device: torch.device | str = "cpu"
) -> Extracted:
    """Return the deltas of a frame, in float32, whose change is closest to `wanted`.

    The report contains the loss: |wanted - change| / |wanted|. A change of zero gives deltas of zero.

    Args:
        frame: A0 and B0, the principal factors of the weight.
        wanted: The change of the weight, float32, in the shape of the weight.
        name: The layer, for the report.
        device: The device of the SVD.
    """
    target = to_matrix(wanted)  # (out, in*kh*kw)
    size = norm(target)
    if not size:
        zero = Delta(frame, torch.zeros_like(frame.down).float(), torch.zeros_like(frame.up).float())
        return Extracted(zero, ExportedLayer(name, frame.rank, frame.rank, 0.0, 0.0))
    root = frame.scale**0.5
    up0, down0 = (to_matrix(factor).double() * root for factor in (frame.up, frame.down))
    up, down = _closest(up0, down0, target, device)
    # Procrustes: Q is the orthogonal factor of B^T B0 + A A0^T
    left, _, right = thin_svd(up.T @ up0 + down @ down0.T)
    gauge = left @ right
    shape = tuple(wanted.shape)
    d_up, d_down = to_factors((up @ gauge - up0) / root, (gauge.T @ down - down0) / root, shape)
    delta = Delta(frame, d_down.float(), d_up.float())
    lost = norm(wanted - change(delta))
    return Extracted(delta, ExportedLayer(name, frame.rank, min(target.shape), size, lost / size))


def _closest(up0: Tensor, down0: Tensor, target: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return balanced factors (out, r) and (r, in*kh*kw) of the best approximation of up0 down0 + target."""
    rank = len(down0)
    total = (up0.float() @ down0.float() + target).to(device)
    left = top_singular(total, rank).u.cpu().double()  # (out, r)
    right = _image(down0.T, up0.T, target.T, left)
    for _ in range(_ITERATIONS):
        left = thin_qr(_image(up0, down0, target, thin_qr(right)[0]))[0]
        right = _image(down0.T, up0.T, target.T, left)  # (in*kh*kw, r): the projection is left right^T
    core_left, values, core_right = thin_svd(right.T)  # (r, r), (r), (r, in*kh*kw)
    scale = values.sqrt()
    return (left @ core_left) * scale, scale[:, None] * core_right


def _image(up0: Tensor, down0: Tensor, target: Tensor, vectors: Tensor) -> Tensor:
    """Return (up0 down0 + target) vectors; the principal in float64, because the change is much smaller."""
    return up0 @ (down0 @ vectors) + (target @ vectors.float()).double()
