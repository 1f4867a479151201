"""The frames of one weight: their directions, their lengths, and the initial factors of LoRA."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectune.core.frames import (
    aligned_frame,
    minor_frame,
    normalized,
    plain_frame,
    principal_frame,
    rank_stabilized,
    svd_down_frame,
)
from spectune.core.linalg import column_norms, row_norms, thin_svd
from spectune.core.low_rank import LowRank, product, to_matrix
from spectune.errors import InputError

SHAPES = [(24, 16), (16, 24), (12, 4, 3, 3), (40, 4, 1, 1)]


def weight(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()


def matrices(frame: LowRank) -> tuple[Tensor, Tensor]:
    """Return A0 (rank, columns) and B0 (out, rank) in float64."""
    return to_matrix(frame.down).double(), to_matrix(frame.up).double()


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_minor_frame_has_the_smallest_singular_values(shape: tuple[int, ...]) -> None:
    u, s, vh = thin_svd(to_matrix(weight(shape)).double())
    frame = minor_frame(weight(shape), rank=3)
    down, up = matrices(frame)
    assert (frame.alpha, frame.rank) == (3.0, 3)
    assert frame.down.shape == (3, *shape[1:])
    assert relative(up @ down, (u[:, -3:] * s[-3:]) @ vh[-3:]) < 1e-6
    assert relative((u[:, -3:] * s[-3:] * 1.01) @ vh[-3:], up @ down) > 1e-3  # mutation
    for norms in (row_norms(down), column_norms(up)):
        assert torch.allclose(norms, s[-3:].sqrt(), rtol=1e-6)


def test_at_full_rank_the_minor_frame_is_the_principal_frame() -> None:
    for rank in (16, 99):
        minor, principal = (make(weight((24, 16)), rank=rank) for make in (minor_frame, principal_frame))
        assert torch.equal(minor.down, principal.down)
        assert torch.equal(minor.up, principal.up)
        assert minor.alpha == 16
    rest = product(principal_frame(weight((24, 16)), rank=13)) + product(
        minor_frame(weight((24, 16)), rank=3)
    )
    assert relative(rest, weight((24, 16)).float()) < 1e-5


def test_a_minor_frame_refuses_damaged_weights_and_is_zero_for_zeros() -> None:
    broken = weight((8, 8))
    broken[0, 0] = math.nan
    with pytest.raises(InputError, match=r"a\.b: 1 of 64 values are NaN or infinite"):
        minor_frame(broken, rank=2, name="a.b")
    frame = minor_frame(torch.zeros(8, 6), rank=2)
    assert not frame.down.any()
    assert not frame.up.any()


@pytest.mark.parametrize("shape", [(64, 48), (64, 16, 3, 3)])
def test_a_plain_frame_has_the_initial_factors_of_lora(shape: tuple[int, ...]) -> None:
    columns = math.prod(shape[1:])
    frame = plain_frame(shape, rank=16, generator=torch.Generator().manual_seed(1))
    again = plain_frame(shape, rank=16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(frame.down, again.down)
    assert not frame.up.any()
    assert frame.down.shape == (16, *shape[1:])
    assert frame.up.shape == (64, 16, *(1 for _ in shape[2:]))
    bound = 1 / math.sqrt(columns)
    oracle = torch.empty(16, *shape[1:])
    torch.nn.init.kaiming_uniform_(oracle, a=math.sqrt(5))  # as in PEFT and sd-scripts
    assert 0.95 * bound < float(oracle.abs().max()) <= bound
    assert 0.95 * bound < float(frame.down.abs().max()) <= bound
    assert float(row_norms(to_matrix(frame.down)).mean()) == pytest.approx(1 / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_svd_down_frame_is_a_lora_along_the_largest_right_vectors(shape: tuple[int, ...]) -> None:
    u, s, vh = thin_svd(to_matrix(weight(shape)).double())
    frame = svd_down_frame(weight(shape), rank=3)
    down, up = matrices(frame)
    assert (frame.alpha, frame.down.shape) == (3.0, (3, *shape[1:]))
    assert not up.any()
    assert relative((down.T @ down), vh[:3].T @ vh[:3] / 3) < 1e-5  # the signs of the vectors are free
    assert relative((1.01 * down).T @ (1.01 * down), vh[:3].T @ vh[:3] / 3) > 1e-2  # mutation
    # the first step of gradient descent, G A0^T A0, is a share of the gradient of those inputs
    gradient = (u * s) @ vh
    assert relative(gradient @ down.T @ down, (u[:, :3] * s[:3]) @ vh[:3] / 3) < 1e-5


def test_a_rank_stabilized_frame_takes_equally_long_first_steps_at_every_rank() -> None:
    """The first step of gradient descent is scale^2 G A0^T A0, and E[A0^T A0] = rank / (3 columns) I."""
    sizes = {True: [], False: []}
    for rank in (4, 16, 64):
        plain = plain_frame((96, 80), rank=rank, generator=torch.Generator().manual_seed(1))
        for frame in (plain, rank_stabilized(plain)):
            down, _ = matrices(frame)
            sizes[frame is plain].append(frame.scale**2 * float(down.square().sum()))
    assert sizes[False] == pytest.approx([16 / 3] * 3, rel=0.05)
    assert sizes[True] == pytest.approx([4 / 3, 16 / 3, 64 / 3], rel=0.05)


def test_no_frame_has_more_than_the_full_rank() -> None:
    assert plain_frame((4, 30), rank=16, generator=torch.Generator()).alpha == 4
    assert principal_frame(weight((4, 30)), rank=16).rank == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_normalized_directions_have_equal_length(shape: tuple[int, ...]) -> None:
    frame = principal_frame(weight(shape), rank=3)
    down, up = matrices(normalized(frame, 0.25))
    assert torch.allclose(row_norms(down), torch.full((3,), 0.25).double(), rtol=1e-6)
    assert torch.allclose(column_norms(up), torch.full((3,), 0.25).double(), rtol=1e-6)
    before, _ = matrices(frame)
    assert torch.allclose(down / row_norms(down)[:, None], before / row_norms(before)[:, None], atol=1e-6)
    plain = normalized(plain_frame(shape, rank=3, generator=torch.Generator().manual_seed(0)), 0.25)
    assert not plain.up.any()  # a zero stays zero
    assert plain.up.isfinite().all()


def test_the_first_step_in_an_aligned_frame_is_the_best_step_of_twice_its_rank() -> None:
    """A step of plain gradient descent is dW = dB A0 + B0 dA with dB = -G A0^T and dA = -B0^T G."""
    gradient = torch.randn(20, 14, generator=torch.Generator().manual_seed(2)).double()
    u, s, vh = thin_svd(gradient)
    down, up = matrices(aligned_frame(u, vh, (20, 14), rank=4, length=1.0))
    step = gradient @ down.T @ down + up @ up.T @ gradient
    assert relative(step, (u[:, :8] * s[:8]) @ vh[:8]) < 1e-6

    down, _ = matrices(
        aligned_frame(u, vh, (20, 14), rank=8, length=0.5)
    )  # the weight has fewer than 16 directions
    assert relative(down, 0.5 * vh[:8]) < 1e-6
