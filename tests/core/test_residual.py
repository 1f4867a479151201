"""Residual + principal equals the weight bit for bit, or differences are counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectune.core.low_rank import LowRank
from spectune.core.residual import add_principal, subtract_principal
from spectune.core.split import split_weight


def weight_of(dtype: torch.dtype, *, size: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 1100, generator=generator) * size
    weight.view(-1)[::11] = -0.0
    weight.view(-1)[1::97] = 1e-7
    return weight.to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize(
    ("original", "residual", "size"),
    [
        (torch.float16, torch.float32, 0.05),
        (torch.float16, torch.float32, 50.0),  # principal parts beyond 0.5: exceptions
        (torch.bfloat16, torch.float32, 0.05),
        (torch.float32, torch.float64, 0.05),
        (torch.float8_e4m3fn, torch.float16, 0.05),
        (torch.float8_e4m3fn, torch.float32, 0.05),
    ],
)
def test_a_wider_residual_restores_every_bit(
    original: torch.dtype, residual: torch.dtype, size: float
) -> None:
    weight = weight_of(original, size=size)
    low_rank = split_weight(weight, rank=8, store=torch.float16).low_rank
    part = subtract_principal(weight, low_rank, residual)
    assert part.residual.dtype == residual
    again = add_principal(part.residual, low_rank, original, exceptions=part.exceptions, name="x")
    wrong = int((bits(again) != bits(weight)).sum())
    # a sum cannot restore -0 of an fp32 or bf16 weight, so -0 becomes an exception
    if part.agreement.exact:
        assert wrong == 0
    else:
        assert wrong == weight.numel() - part.agreement.bit_equal


def test_exceptions_are_few_and_necessary() -> None:
    weight = torch.randn(300, 1100, generator=torch.Generator().manual_seed(0)).mul_(50).half()
    weight[0, :200] = 1e-7  # with principal parts of about 10, whose float32 ulp is 1e-6
    low_rank = split_weight(weight, rank=8, store=torch.float16).low_rank
    part = subtract_principal(weight, low_rank, torch.float32)
    assert part.exceptions is not None
    assert 0 < len(part.exceptions) <= weight.numel() // 1000
    assert part.agreement.exact
    without = add_principal(part.residual, low_rank, torch.float16, name="x")
    assert int((bits(without) != bits(weight)).sum()) == len(part.exceptions)


def test_a_16_bit_residual_reports_its_bit_equal_share() -> None:
    weight = weight_of(torch.float16)
    low_rank = split_weight(weight, rank=8).low_rank
    part = subtract_principal(weight, low_rank, torch.float16)
    assert part.exceptions is None
    again = add_principal(part.residual, low_rank, torch.float16, name="x")
    assert int((bits(again) == bits(weight)).sum()) == part.agreement.bit_equal
    assert 0.5 < part.agreement.share < 1


def test_a_factor_off_by_one_percent_does_not_restore_the_weight() -> None:
    weight = weight_of(torch.float16)
    low_rank = split_weight(weight, rank=8).low_rank
    part = subtract_principal(weight, low_rank, torch.float32)
    off = LowRank(low_rank.down, low_rank.up * 1.01, low_rank.alpha)
    again = add_principal(part.residual, off, torch.float16, name="x")
    assert not torch.equal(again, weight)
