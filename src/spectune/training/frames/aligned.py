"""Frames from the first batches of a run: directions of their gradients or of their inputs.

Both are singular directions of a matrix M of the shape of a weight: G, the sum of dL/dW, or W C with
C = sum x x^T over the inputs x of the layer. M itself is never computed. A randomized range finder (Halko,
Martinsson, Tropp 2011, algorithms 4.4 and 5.1) needs only products with few vectors, M Omega and Q^T M, each
in one pass over the batches. The memory needed is about that of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from spectune.core.frames import UNIT_LENGTH, aligned_frame, normalized
from spectune.core.linalg import thin_qr, thin_svd
from spectune.core.low_rank import LowRank, to_factors, to_matrix
from spectune.core.rank import full_rank
from spectune.errors import SpectuneError, counted, some_of
from spectune.model.inject import AdaptedLayer
from spectune.training.seeds import derived_generator

OVERSAMPLING = 16  # extra directions of the range finder
POWER_ROUNDS = 1  # each takes two more passes and reduces the error of the range

Matrices = Mapping[str, Tensor]  # by layer
Losses = Callable[[], Iterable[Tensor]]  # the scalar loss of each batch; the same batches at each call


@dataclass(frozen=True)
class Alignment:
    """Frames from the first batches, and the layers that got none."""

    frames: Mapping[str, LowRank]
    unreached: tuple[str, ...]  # layers with M = 0, which keep their frame

    @property
    def warnings(self) -> list[str]:
        """A warning that names the unreached layers, if there are any."""
        if not self.unreached:
            return []
        count = counted(len(self.unreached), "layer")
        names = some_of(list(self.unreached))
        return [f"the first batches determine no frame for {count}; plain frames are used: {names}"]


def align(
    layers: Mapping[str, AdaptedLayer],
    kind: Literal["gradient", "data"],
    losses: Losses,
    *,
    seed: int,
    length: float | None = None,
) -> Alignment:
    """Return frames for layers in the delta form, with their current ranks; float32, on the CPU.

    The layers keep their frames but get new trainable tensors.

    Args:
        layers: The layers by name.
        kind: The matrix M: gradients, or weights times input covariance.
        losses: Runs the batches and returns their losses.
        seed: The seed of the range finder.
        length: The length of every direction; None takes that of the kind.

    Raises:
        SpectuneError: The batches give values that are not finite.
    """
    shapes = {name: tuple(layer.base.weight.shape) for name, layer in layers.items()}
    ranks = {name: layer.down.shape[0] for name, layer in layers.items()}
    directions = {name: 2 * rank if kind == "gradient" else rank for name, rank in ranks.items()}
    widths = {name: min(directions[name] + OVERSAMPLING, full_rank(shape)) for name, shape in shapes.items()}
    frames: dict[str, LowRank] = {}
    unreached: list[str] = []
    with _without_dropout(layers), _frames_restored(layers):
        products = Gradients(layers, losses) if kind == "gradient" else Inputs(layers, losses)
        bases, cores = range_of(products, shapes, widths, seed=seed)
        for name, layer in layers.items():
            core = cores.pop(name).double()  # (width, in*kh*kw)
            if not core.any():
                unreached.append(name)
                continue
            v, _, pt = thin_svd(core.T)  # the transpose is several times faster for wide matrices
            u, vh, rank = bases.pop(name).double() @ pt.T, v.T, ranks[name]
            if kind == "gradient":
                # gradients define no length
                frame = aligned_frame(u, vh, shapes[name], rank=rank, length=length or UNIT_LENGTH)
            else:
                frame = projected_frame(layer.base.weight, u[:, :rank])
                frame = frame if length is None else normalized(frame, length)
            frames[name] = frame
    return Alignment(frames, tuple(unreached))


def projected_frame(weight: Tensor, u: Tensor) -> LowRank:
    """Return u u^T W as balanced factors, float32, for orthonormal columns u (out, rank).

    With U_r of the singular value decomposition U S V^T of W C, it is CorDA's U_r S_r V_r^T C^-1 without the
    inverse (Yang et al. 2024, arXiv 2406.05223).
    """
    matrix = to_matrix(weight.detach()).cpu().double()
    v, s, pt = thin_svd((u.T @ matrix).T)
    root = s.sqrt()
    up, down = to_factors((u @ pt.T) * root, root[:, None] * v.T, tuple(weight.shape))
    return LowRank(down=down.float(), up=up.float(), alpha=float(u.shape[1]))


def range_of(
    products: Gradients | Inputs,
    shapes: Mapping[str, tuple[int, ...]],
    widths: Mapping[str, int],
    *,
    seed: int,
    power_rounds: int = POWER_ROUNDS,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return an orthonormal basis Q (out, width) of most of M's range, and Q^T M, by layer; on the CPU."""
    omegas = {name: _gaussian(math.prod(shapes[name][1:]), widths[name], seed, name) for name in shapes}
    for power_round in range(power_rounds + 1):
        bases = {name: _orthonormal(image) for name, image in _checked(products.right(omegas)).items()}
        cores = _checked(products.left(bases))
        if power_round == power_rounds:
            return bases, cores
        omegas = {name: _orthonormal(core.T).T for name, core in cores.items()}
    raise AssertionError("`power_rounds` is negative")


def _gaussian(columns: int, width: int, seed: int, name: str) -> Tensor:
    return torch.randn(width, columns, generator=derived_generator(seed, "sketch", name))


def _orthonormal(columns: Tensor) -> Tensor:
    # float64: float32 would lose small directions next to large ones
    return thin_qr(columns.double())[0].to(columns.dtype)


def _checked(matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    broken = [name for name, matrix in matrices.items() if not bool(torch.isfinite(matrix).all())]
    if broken:
        raise SpectuneError(
            f"the first batches give values that are not finite in {counted(len(broken), 'layer')}: "
            f"{some_of(broken)}",
            hint='check the images and the base, or set run.precision = "fp32"',
        )
    return matrices


class Gradients:
    """Multiply matrices by M = G of each layer, the sum of the gradients of its weight.

    Each call is one pass over the batches.

    At dA = dB = 0, the gradient of dB is G A0^T and the gradient of dA is B0^T G.
    """

    def __init__(self, layers: Mapping[str, AdaptedLayer], losses: Losses) -> None:
        self._layers, self._losses = layers, losses

    def right(self, omegas: Matrices) -> dict[str, Tensor]:
        """Return M Omega, (out, width), for the transposed Omega, (width, in*kh*kw), of each layer."""
        for name, layer in self._layers.items():
            shape = tuple(layer.base.weight.shape)
            self._set_frame(layer, omegas[name].new_zeros(shape[0], len(omegas[name])), omegas[name])
            layer.down.requires_grad_(False)
        return self._gradients("up")

    def left(self, bases: Matrices) -> dict[str, Tensor]:
        """Return Q^T M, (width, in*kh*kw), for Q, (out, width), of each layer."""
        for name, layer in self._layers.items():
            columns = to_matrix(layer.base.weight).shape[1]
            self._set_frame(layer, bases[name], bases[name].new_zeros(bases[name].shape[1], columns))
            layer.up.requires_grad_(False)
        return self._gradients("down")

    def _set_frame(self, layer: AdaptedLayer, up: Tensor, down: Tensor) -> None:
        working = working_dtype(layer.base)
        up, down = to_factors(up.to(working), down.to(working), tuple(layer.base.weight.shape))
        # gradients are summed in the dtype of the trained tensors
        layer.reframe(LowRank(down=down, up=up, alpha=float(down.shape[0])), dtype=working)

    def _gradients(self, which: Literal["up", "down"]) -> dict[str, Tensor]:
        for loss in self._losses():
            loss.backward()
        gradients: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            tensor = layer.up if which == "up" else layer.down
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            gradients[name] = to_matrix(gradient.detach()).cpu()
            tensor.grad = None
        return gradients


class Inputs:
    """Multiply matrices by M = W C of each layer, where C is the sum of x x^T over its inputs x.

    Each call is one pass over the batches. For a convolution, x are its input patches. C is not stored: it is
    symmetric, so W C Omega = W (Omega^T C)^T and Q^T W C = (Q^T W) C need only products of rows with C.
    """

    def __init__(self, layers: Mapping[str, AdaptedLayer], losses: Losses) -> None:
        self._layers, self._losses = layers, losses

    def right(self, omegas: Matrices) -> dict[str, Tensor]:
        products = self._times_c(omegas)
        return {name: self._weight(name) @ rows.T for name, rows in products.items()}

    def left(self, bases: Matrices) -> dict[str, Tensor]:
        return self._times_c({name: basis.T @ self._weight(name) for name, basis in bases.items()})

    def _weight(self, name: str) -> Tensor:
        base = self._layers[name].base
        return to_matrix(base.weight.detach()).to(working_dtype(base)).cpu()

    @torch.no_grad()
    def _times_c(self, rows: Matrices) -> dict[str, Tensor]:
        """Return rows times C, (width, in*kh*kw), for every layer."""
        sums: dict[str, Tensor] = {}
        hooks = [
            layer.register_forward_pre_hook(partial(_add_product, sums, name, rows[name]))
            for name, layer in self._layers.items()
        ]
        try:
            for _ in self._losses():
                pass
        finally:
            for hook in hooks:
                hook.remove()
        return {
            name: sums[name].cpu() if name in sums else torch.zeros_like(matrix)
            for name, matrix in rows.items()
        }


def _add_product(sums: dict[str, Tensor], name: str, rows: Tensor, layer: nn.Module, args: Any) -> None:
    assert isinstance(layer, AdaptedLayer)
    if not layer.enabled:
        return  # this call is the teacher's
    base = layer.base
    # float32: a sum over all tokens of all batches
    x: Tensor = args[0].detach().to(working_dtype(base))
    rows = rows.to(x)
    if isinstance(base, nn.Conv2d):
        where: Any = (base.stride, base.padding, base.dilation)  # torch.nn.grad is typed for single integers
        filters = rows.view(-1, *base.weight.shape[1:])
        product = to_matrix(conv2d_weight(x, filters.shape, F.conv2d(x, filters, None, *where), *where))
    else:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        product = (flat @ rows.T).T @ flat
    sums[name] = sums[name] + product if name in sums else product


def working_dtype(base: nn.Linear | nn.Conv2d) -> torch.dtype:
    """Return float32, or the dtype of the weight if that is wider."""
    return torch.promote_types(base.weight.dtype, torch.float32)


@contextmanager
def _without_dropout(layers: Mapping[str, AdaptedLayer]) -> Iterator[None]:
    before = {name: layer.dropout for name, layer in layers.items()}
    for layer in layers.values():
        layer.dropout = 0.0
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.dropout = before[name]


@contextmanager
def _frames_restored(layers: Mapping[str, AdaptedLayer]) -> Iterator[None]:
    """Restore the frames of all layers after the block."""
    before = {name: (layer.frame, layer.down.dtype) for name, layer in layers.items()}
    try:
        yield
    finally:
        for name, layer in layers.items():
            frame, dtype = before[name]
            layer.reframe(frame, dtype=dtype)
