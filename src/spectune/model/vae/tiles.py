"""Run an autoencoder on overlapping tiles of a picture, for pictures that do not fit into memory at once.

The tiles overlap by about a quarter or more and are blended there. Normalized with its own statistics, each
tile would have another brightness. Therefore all tiles use the statistics of a small copy of the picture.
Attention is limited to a tile. The result is close to that of the complete picture, but not equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE_PX = 512  # the edge of a tile
_OVERLAP = 4  # a tile overlaps the next one by at least its edge divided by this


def in_tiles(
    run: Callable[[Tensor], Tensor], whole: Tensor, *, edge: int, network: nn.Module, step: int = 1
) -> Tensor:
    """Return `run(whole)`, computed on tiles of `edge` rows and columns of one picture at a time.

    Args:
        run: From (batch, channels, h, w) to (batch, other channels, h * k, w * k), with one k for all tiles.
        whole: The input, (batch, channels, height, width). Pictures that are not larger than a tile are run
            in one piece.
        edge: The edge of a tile, in rows of `whole`.
        network: The module that `run` calls.
        step: The rows and columns of `whole` that one row or column of the result is made from.
    """
    if len(whole) > 1:
        return torch.cat([in_tiles(run, row[None], edge=edge, network=network, step=step) for row in whole])
    if max(whole.shape[-2:]) <= edge:
        return run(whole)
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    if not norms:  # an AutoencoderDC normalizes each position by itself
        return _blended(run, whole, edge, step)
    with _normalized_like(norms, run, _small_copy(whole, edge)):
        return _blended(run, whole, edge, step)


def _blended(run: Callable[[Tensor], Tensor], whole: Tensor, edge: int, step: int) -> Tensor:
    height, width = whole.shape[-2:]
    tops, lefts = _starts(height, edge, step), _starts(width, edge, step)
    total = weights = torch.zeros(())
    ratio = 1.0
    for top in tops:
        for left in lefts:
            tile = run(whole[..., top : top + edge, left : left + edge])
            if not total.dim():  # the first tile tells the shape of the result
                ratio = tile.shape[-1] / min(edge, width)
                size = (round(height * ratio), round(width * ratio))
                total = tile.new_zeros((*tile.shape[:2], *size), dtype=torch.float32)
                weights = tile.new_zeros(size, dtype=torch.float32)
            weight = _weight(tile)
            rows, columns = (
                slice(round(start * ratio), round(start * ratio) + length)
                for start, length in zip((top, left), tile.shape[-2:], strict=True)
            )
            total[..., rows, columns] += weight * tile
            weights[rows, columns] += weight
    return total / weights


def _starts(length: int, edge: int, step: int) -> list[int]:
    """Return the first row or column of each tile: as few evenly spaced tiles as cover `length`.

    All are multiples of `step`. Between two of them, a tile would be placed beside its row of the result.
    """
    if length <= edge:
        return [0]
    count = 1 - (-(length - edge) // (edge - edge // _OVERLAP))
    return [round(index * (length - edge) / (count - 1) / step) * step for index in range(count)]


def _weight(tile: Tensor) -> Tensor:
    """Return weights (height, width) that fall linearly to the borders of a tile."""

    def ramp(length: int) -> Tensor:
        distance = torch.arange(1, length + 1, device=tile.device)
        return torch.minimum(distance, distance.flip(0)).clamp(max=max(1, length // _OVERLAP)).float()

    return ramp(tile.shape[-2])[:, None] * ramp(tile.shape[-1])


# ---------------------------------------------------------------- normalization


def _small_copy(whole: Tensor, edge: int) -> Tensor:
    """Return the picture in the size of a tile, with the mean and the deviation of each channel."""
    height, width = whole.shape[-2:]
    shrink = edge / max(height, width)
    size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    small = F.interpolate(whole.float(), size=size, mode="area")
    (old_std, old_mean), (std, mean) = (
        torch.std_mean(values.float(), dim=(2, 3), keepdim=True) for values in (whole, small)
    )
    return ((small - mean) / std.clamp(min=1e-6) * old_std + old_mean).to(whole.dtype)


@contextmanager
def _normalized_like(
    norms: Sequence[nn.GroupNorm], run: Callable[[Tensor], Tensor], sample: Tensor
) -> Iterator[None]:
    """Make group norms use their statistics of `run(sample)` inside the block."""
    affine: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def record(norm: nn.GroupNorm, arguments: tuple[Tensor]) -> None:
        affine[norm] = _affine(norm, arguments[0])

    with ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_pre_hook(record))
        run(sample)
    try:
        for norm, (scale, shift) in affine.items():
            norm.__dict__["forward"] = partial(_scaled, scale=scale, shift=shift)
        yield
    finally:
        for norm in affine:
            del norm.__dict__["forward"]  # the method of the class again


def _affine(norm: nn.GroupNorm, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift, (channels,) float32, that normalize `values` (1, channels, ...)."""
    variance, mean = torch.var_mean(values.float().reshape(norm.num_groups, -1), dim=1, unbiased=False)
    per_group = norm.num_channels // norm.num_groups
    scale = norm.weight.float() * (variance + norm.eps).rsqrt().repeat_interleave(per_group)
    return scale, norm.bias.float() - mean.repeat_interleave(per_group) * scale


def _scaled(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    shape = (1, -1, *(1,) * (values.dim() - 2))
    scale, shift = (tensor.view(shape).to(values.dtype) for tensor in (scale, shift))
    return torch.addcmul(shift, values, scale)
