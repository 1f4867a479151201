"""Frames that the first batches of a run decide: directions of their gradients or of their inputs.

Both are singular directions of a matrix M of the shape of a weight, which is never held: G, the sum of dL/dW,
or W C with C = sum x x^T over the inputs x of the layer. What can be had are products with few vectors, each
for one look at the batches: M Omega and Q^T M. A randomised range finder needs no more (Halko, Martinsson,
Tropp 2011, algorithms 4.4 and 5.1). What is kept has the size of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from spectune.core.frames import aligned_frame, normalized
from spectune.core.linalg import thin_qr, thin_svd
from spectune.core.low_rank import LowRank, to_factors, to_matrix
from spectune.core.rank import full_rank
from spectune.errors import SpectuneError, some_of
from spectune.model.inject import AdaptedLayer
from spectune.training.seeds import derived_generator

OVERSAMPLING = 16  # directions beyond those that are wanted
POWER_ROUNDS = 1  # each presses down what was left out once more, for two more looks
UNIT_LENGTH = 1 / math.sqrt(3)  # of a row of plain LoRA, for directions without a length of their own

Matrices = Mapping[str, Tensor]  # by layer
Losses = Callable[[], Iterable[Tensor]]  # the same batches each time; the loss of each, a scalar


class Products(Protocol):
    """The matrix M (out, in*kh*kw) of every layer, by its products; each call looks at all batches."""

    def right(self, omegas: Matrices) -> dict[str, Tensor]:
        """M Omega, (out, width), of the transposed Omega, (width, in*kh*kw)."""
        ...

    def left(self, bases: Matrices) -> dict[str, Tensor]:
        """Q^T M, (width, in*kh*kw), of Q, (out, width)."""
        ...


@dataclass(frozen=True)
class Alignment:
    """The frames that were found, and the layers that the batches say nothing about."""

    frames: Mapping[str, LowRank]
    silent: tuple[str, ...]  # they keep the frame that they had

    @property
    def warnings(self) -> list[str]:
        if not self.silent:
            return []
        return [f"{len(self.silent)} layers have no part in the first batches: {some_of(list(self.silent))}"]


def align(
    layers: Mapping[str, AdaptedLayer],
    kind: Literal["gradient", "data"],
    losses: Losses,
    *,
    seed: int,
    length: float | None = None,
    power_rounds: int = POWER_ROUNDS,
) -> Alignment:
    """The frames of layers in the delta form, of the ranks that they have now; float32, on the CPU.

    `length` is that of every direction. The layers stay as they are, but for new trainable tensors. Raises
    SpectuneError where the batches give numbers that are not finite.
    """
    shapes = {name: tuple(layer.base.weight.shape) for name, layer in layers.items()}
    ranks = {name: layer.down.shape[0] for name, layer in layers.items()}
    wanted = {name: 2 * rank if kind == "gradient" else rank for name, rank in ranks.items()}
    widths = {name: min(wanted[name] + OVERSAMPLING, full_rank(shape)) for name, shape in shapes.items()}
    frames: dict[str, LowRank] = {}
    silent: list[str] = []
    with _undropped(layers), _as_they_were(layers):
        products = Gradients(layers, losses) if kind == "gradient" else Inputs(layers, losses)
        bases, cores = range_of(products, shapes, widths, seed=seed, power_rounds=power_rounds)
        for name, layer in layers.items():
            core = cores.pop(name).double()  # (width, in*kh*kw)
            if not core.any():
                silent.append(name)
                continue
            v, _, pt = thin_svd(core.T)  # the transpose is several times faster for wide matrices
            u, vh, rank = bases.pop(name).double() @ pt.T, v.T, ranks[name]
            if kind == "gradient":
                frame = aligned_frame(u, vh, shapes[name], rank=rank, length=length or UNIT_LENGTH)
            else:
                frame = projected_frame(layer.base.weight, u[:, :rank])
                frame = frame if length is None else normalized(frame, length)
            frames[name] = frame
    return Alignment(frames, tuple(silent))


def projected_frame(weight: Tensor, u: Tensor) -> LowRank:
    """u u^T W as balanced factors, float32, of orthonormal columns u (out, rank).

    With U_r of the singular value decomposition U S V^T of W C, it is CorDA's U_r S_r V_r^T C^-1 without the
    inverse (Yang et al. 2024, arXiv 2406.05223).
    """
    matrix = to_matrix(weight.detach()).cpu().double()
    v, s, pt = thin_svd((u.T @ matrix).T)
    root = s.sqrt()
    up, down = to_factors((u @ pt.T) * root, root[:, None] * v.T, tuple(weight.shape))
    return LowRank(down=down.float(), up=up.float(), alpha=float(u.shape[1]))


def range_of(
    products: Products,
    shapes: Mapping[str, tuple[int, ...]],
    widths: Mapping[str, int],
    *,
    seed: int,
    power_rounds: int = POWER_ROUNDS,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Q (out, width) with orthonormal columns that hold most of M, and Q^T M, for every layer; on the CPU."""
    omegas = {name: _gaussian(math.prod(shapes[name][1:]), widths[name], seed, name) for name in shapes}
    for turn in range(power_rounds + 1):
        bases = {name: _orthonormal(image) for name, image in _finite(products.right(omegas)).items()}
        cores = _finite(products.left(bases))
        if turn == power_rounds:
            return bases, cores
        omegas = {name: _orthonormal(core.T).T for name, core in cores.items()}
    raise AssertionError("no round")


def _gaussian(columns: int, width: int, seed: int, name: str) -> Tensor:
    return torch.randn(width, columns, generator=derived_generator(seed, "sketch", name))


def _orthonormal(columns: Tensor) -> Tensor:
    # float64: directions far below the first keep some digits
    return thin_qr(columns.double())[0].to(columns.dtype)


def _finite(found: dict[str, Tensor]) -> dict[str, Tensor]:
    odd = [name for name, matrix in found.items() if not bool(torch.isfinite(matrix).all())]
    if odd:
        raise SpectuneError(
            f"the first batches give {len(odd)} layers numbers that are not finite: {some_of(odd)}",
            hint='look at the pictures and the base, or take run.precision = "fp32"',
        )
    return found


class Gradients:
    """M = G, the sum of the gradients with respect to the weight, read off those of the change.

    At dA = dB = 0 the gradient with respect to dB is G A0^T, that with respect to dA is B0^T G.
    """

    def __init__(self, layers: Mapping[str, AdaptedLayer], losses: Losses) -> None:
        self._layers, self._losses = layers, losses

    def right(self, omegas: Matrices) -> dict[str, Tensor]:
        for name, layer in self._layers.items():
            shape = tuple(layer.base.weight.shape)
            self._stand_in(layer, omegas[name].new_zeros(shape[0], len(omegas[name])), omegas[name])
            layer.down.requires_grad_(False)
        return self._looked("up")

    def left(self, bases: Matrices) -> dict[str, Tensor]:
        for name, layer in self._layers.items():
            columns = to_matrix(layer.base.weight).shape[1]
            self._stand_in(layer, bases[name], bases[name].new_zeros(bases[name].shape[1], columns))
            layer.up.requires_grad_(False)
        return self._looked("down")

    def _stand_in(self, layer: AdaptedLayer, up: Tensor, down: Tensor) -> None:
        working = working_dtype(layer.base)
        up, down = to_factors(up.to(working), down.to(working), tuple(layer.base.weight.shape))
        # gradients are summed in the type of the trained tensors
        layer.reframe(LowRank(down=down, up=up, alpha=float(down.shape[0])), dtype=working)

    def _looked(self, which: Literal["up", "down"]) -> dict[str, Tensor]:
        for loss in self._losses():
            loss.backward()
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            tensor = layer.up if which == "up" else layer.down
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            found[name] = to_matrix(gradient.detach()).cpu()
            tensor.grad = None
        return found


class Inputs:
    """M = W C with C = sum x x^T, of the inputs x of the layer, patches in a convolution.

    C is symmetric: W C Omega = W (Omega^T C)^T and Q^T W C = (Q^T W) C need nothing but rows times C.
    """

    def __init__(self, layers: Mapping[str, AdaptedLayer], losses: Losses) -> None:
        self._layers, self._losses = layers, losses

    def right(self, omegas: Matrices) -> dict[str, Tensor]:
        found = self._times(omegas)
        return {name: self._weight(name) @ rows.T for name, rows in found.items()}

    def left(self, bases: Matrices) -> dict[str, Tensor]:
        return self._times({name: basis.T @ self._weight(name) for name, basis in bases.items()})

    def _weight(self, name: str) -> Tensor:
        base = self._layers[name].base
        return to_matrix(base.weight.detach()).to(working_dtype(base)).cpu()

    @torch.no_grad()
    def _times(self, rows: Matrices) -> dict[str, Tensor]:
        """rows C, (width, in*kh*kw), of every layer."""
        sums: dict[str, Tensor] = {}
        hooks = [
            layer.register_forward_pre_hook(partial(_add_times, sums, name, rows[name]))
            for name, layer in self._layers.items()
        ]
        try:
            for _ in self._losses():
                pass
        finally:
            for hook in hooks:
                hook.remove()
        return {name: sums[name].cpu() if name in sums else torch.zeros_like(it) for name, it in rows.items()}


def _add_times(sums: dict[str, Tensor], name: str, rows: Tensor, layer: nn.Module, args: Any) -> None:
    assert isinstance(layer, AdaptedLayer)
    if not layer.enabled:
        return  # the model as it was is asked, for what it teaches
    base = layer.base
    # float32: a sum over all tokens of all batches
    x: Tensor = args[0].detach().to(working_dtype(base))
    rows = rows.to(x)
    if isinstance(base, nn.Conv2d):
        where: Any = (base.stride, base.padding, base.dilation)  # torch.nn.grad is typed for single numbers
        filters = rows.view(-1, *base.weight.shape[1:])
        found = to_matrix(conv2d_weight(x, filters.shape, F.conv2d(x, filters, None, *where), *where))
    else:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        found = (flat @ rows.T).T @ flat
    sums[name] = sums[name] + found if name in sums else found


def working_dtype(base: nn.Linear | nn.Conv2d) -> torch.dtype:
    """float32, or wider where the model is."""
    return torch.promote_types(base.weight.dtype, torch.float32)


@contextmanager
def _undropped(layers: Mapping[str, AdaptedLayer]) -> Iterator[None]:
    before = {name: layer.dropout for name, layer in layers.items()}
    for layer in layers.values():
        layer.dropout = 0.0
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.dropout = before[name]


@contextmanager
def _as_they_were(layers: Mapping[str, AdaptedLayer]) -> Iterator[None]:
    """Within, layers may take other frames; afterwards they have their own again."""
    before = {
        name: (LowRank(layer.frame_down, layer.frame_up, layer.alpha), layer.down.dtype)
        for name, layer in layers.items()
    }
    try:
        yield
    finally:
        for name, layer in layers.items():
            frame, dtype = before[name]
            layer.reframe(frame, dtype=dtype)
