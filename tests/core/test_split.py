"""Splitting one weight into principal factors and a residual."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectune.core.agreement import compare
from spectune.core.low_rank import product
from spectune.core.residual import subtract_principal
from spectune.core.split import split_weight
from spectune.errors import InputError


def random_weight(
    shape: tuple[int, ...], *, dtype: torch.dtype = torch.float16, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


@pytest.mark.parametrize("store", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (24, 16, 3, 3), (24, 16, 1, 1)])
def test_a_float32_residual_restores_every_fp16_bit(shape: tuple[int, ...], store: torch.dtype) -> None:
    weight = random_weight(shape)
    weight.view(-1)[::7] = -0.0
    weight.view(-1)[1::7] = 0.0
    weight.view(-1)[2::7] = -(2.0**-24)  # the smallest magnitude in fp16
    low_rank = split_weight(weight, rank=6, store=store).low_rank
    rebuilt = (subtract_principal(weight, low_rank, torch.float32).residual + product(low_rank)).to(
        torch.float16
    )
    assert compare(rebuilt, weight).exact


@given(st.integers(2, 24), st.integers(2, 24), st.integers(1, 30), st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_the_round_trip_holds_for_any_shape_and_rank(rows: int, columns: int, rank: int, seed: int) -> None:
    weight = random_weight((rows, columns), seed=seed)
    split = split_weight(weight, rank=rank)
    assert split.low_rank.rank == min(rank, rows, columns) == split.report.rank
    assert split.low_rank.alpha == split.low_rank.rank
    assert split.low_rank.scale == 1.0
    assert split.report.capped == (rank >= min(rows, columns))
    rebuilt = (
        subtract_principal(weight, split.low_rank, torch.float32).residual + product(split.low_rank)
    ).to(torch.float16)
    assert compare(rebuilt, weight).exact


def test_the_residual_matches_the_stored_factors() -> None:
    weight = random_weight((64, 96))
    low_rank = split_weight(weight, rank=8, store=torch.bfloat16).low_rank
    assert low_rank.up.dtype == low_rank.down.dtype == torch.bfloat16
    exact = weight.double() - low_rank.up.double() @ low_rank.down.double()
    error = torch.linalg.norm(subtract_principal(weight, low_rank, torch.float32).residual - exact)
    # compared with the unrounded factors, the error would be that of bf16, 2**-9
    assert float(error / torch.linalg.norm(exact)) < 1e-6


def test_a_16_bit_residual_costs_one_rounding() -> None:
    weight = random_weight((96, 96))
    low_rank = split_weight(weight, rank=8).low_rank
    stored = subtract_principal(weight, low_rank, torch.float16).residual
    rebuilt = (stored.float() + product(low_rank)).to(torch.float16)
    agreement = compare(rebuilt, weight)
    assert 0.5 < agreement.share < 1.0
    assert agreement.relative_error < 2.0**-10


def test_factors_are_balanced_and_the_report_has_their_energy() -> None:
    weight = random_weight((64, 48), dtype=torch.float32)
    split = split_weight(weight, rank=16, store=torch.float32)
    up, down = split.low_rank.up, split.low_rank.down
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-5, atol=0)
    left = float((weight - product(split.low_rank)).square().sum() / weight.square().sum())
    assert split.report.energy == pytest.approx(1 - left, abs=1e-6)
    values = torch.linalg.svdvals(weight)
    assert split.report.largest == pytest.approx(float(values[0]), rel=1e-5)
    assert split.report.smallest_kept == pytest.approx(float(values[15]), rel=1e-5)


def test_a_zero_weight_splits_into_zeros() -> None:
    split = split_weight(torch.zeros(8, 8, dtype=torch.float16), rank=2)
    assert not product(split.low_rank).any()
    assert split.report.energy == 1.0


def test_an_error_names_the_weight_and_counts_its_bad_values() -> None:
    weight = random_weight((8, 8))
    weight[0, 0], weight[1, 1] = float("nan"), float("inf")
    with pytest.raises(InputError, match=r"unet\.mid: 2 of 64 values are NaN or infinite"):
        split_weight(weight, rank=2, name="unet.mid")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(
        InputError, match=r"te1\.x is stored in .*: expected one of float16, bfloat16, float32"
    ):
        split_weight(torch.zeros(4, 4).to(dtype), rank=1, name="te1.x")


def test_factors_too_large_for_fp16_are_refused() -> None:
    weight = torch.full((4, 4), 1e10)
    with pytest.raises(
        InputError, match=r"te1.x: 4 of 4 values, up to 1e\+05, exceed the range of float16"
    ) as caught:
        split_weight(weight, rank=1, name="te1.x")
    assert caught.value.hint == "store in bfloat16 or float32"
    assert split_weight(weight, rank=1, store=torch.bfloat16).low_rank.rank == 1
