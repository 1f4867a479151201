"""Tiles: where each output comes from, and what the blending keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectune.model.vae.tiles import _starts, in_tiles

NORMALIZED = nn.GroupNorm(1, 4)  # a network whose tiles need the statistics of the picture


def doubled(tile: Tensor) -> Tensor:
    """Return a tile at twice its size, like a decoder."""
    return tile.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 40), (8, 100), (33, 16)])
def test_a_function_of_single_values_is_unchanged(height: int, width: int) -> None:
    whole = torch.randn(2, 3, height, width)
    torch.testing.assert_close(in_tiles(doubled, whole, edge=16, network=nn.Identity()), doubled(whole))
    smaller = in_tiles(
        lambda tile: tile[..., ::2, ::2], torch.randn(1, 3, 48, 64), edge=16, network=nn.Identity()
    )
    assert smaller.shape == (1, 3, 24, 32)


def test_tiles_have_one_size_and_one_picture() -> None:
    shapes: list[tuple[int, ...]] = []

    def run(tile: Tensor) -> Tensor:
        shapes.append(tuple(tile.shape))
        return tile

    in_tiles(run, torch.randn(2, 4, 128, 130), edge=64, network=NORMALIZED)
    # 128 = 3 tiles with an overlap of 32, 130 = 3 tiles with an overlap of 31
    small = (1, 4, 63, 64)  # for the statistics
    assert shapes == [*[small, *[(1, 4, 64, 64)] * 9] * 2]
    shapes.clear()
    in_tiles(run, torch.randn(3, 4, 64, 64), edge=64, network=NORMALIZED)
    assert shapes == [(1, 4, 64, 64)] * 3, "one picture at a time, in one piece"


def test_neighbors_are_blended_linearly() -> None:
    """Give each tile another value: the result moves from one value to the other without a step."""
    values = iter([9.0, 0.0, 1.0])  # the first is the small copy
    blended = in_tiles(
        lambda tile: torch.full_like(tile, next(values)),
        torch.zeros(1, 1, 16, 28),
        edge=16,
        network=NORMALIZED,
    )
    row = blended[0, 0, 8]
    assert row[:12].eq(0).all()
    assert row[16:].eq(1).all()
    torch.testing.assert_close(row[12:16], torch.tensor([0.2, 0.4, 0.6, 0.8]))


def test_tiles_are_normalized_like_the_picture() -> None:
    """Compare tiles with statistics of their own: a dark and a bright half would both become gray."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 4)
    whole = 0.1 * torch.randn(1, 4, 16, 64)
    whole[..., 32:] += 3
    expected = norm(whole)
    plain = in_tiles(norm, whole, edge=16, network=nn.Identity())
    shared = in_tiles(norm, whole, edge=16, network=norm)
    assert (plain - expected).abs().max() > 1
    assert (shared - expected).abs().max() < 0.02
    torch.testing.assert_close(norm(whole), expected, rtol=0, atol=0)  # the method is back


def test_tiles_start_where_a_row_of_the_result_starts() -> None:
    """Each value of the result is made from `step` rows, as in an encoder, so tiles must not shift it."""
    picture = torch.arange(1344.0).repeat(64, 1)[None, None]
    encoded = in_tiles(lambda tile: F.avg_pool2d(tile, 32), picture, edge=512, network=nn.Identity(), step=32)
    torch.testing.assert_close(encoded, F.avg_pool2d(picture, 32))
    assert _starts(1344, 512, 32) == [0, 288, 544, 832]
    assert _starts(1344, 512, 1) == [0, 277, 555, 832]


def test_without_group_norms_no_small_copy_is_needed() -> None:
    sizes: list[int] = []

    def run(tile: Tensor) -> Tensor:
        sizes.append(tile.shape[-1])
        return tile

    in_tiles(run, torch.zeros(1, 1, 16, 28), edge=16, network=nn.Identity())
    assert sizes == [16, 16]
