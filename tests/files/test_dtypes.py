from __future__ import annotations

import pytest
import torch

from spectune.errors import InputError
from spectune.files.dtypes import (
    STORE_DTYPES,
    WEIGHT_DTYPES_BY_NAME,
    parse_dtype,
    parse_residual_dtype,
    parse_weight_dtype,
)


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        ("float16", torch.float16),
        ("fp16", torch.float16),
        ("Half", torch.float16),
        ("BF16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float", torch.float32),
        ("fp32", torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_are_parsed_from_long_and_short_names(word: str | torch.dtype, dtype: torch.dtype) -> None:
    assert parse_dtype(word) == parse_weight_dtype(word) == parse_residual_dtype(word) == dtype


def test_fp8_is_allowed_for_complete_weights_only() -> None:
    eight = {"fp8": "float8_e4m3fn", "fp8_e4m3fn": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
    for short, name in eight.items():
        assert parse_weight_dtype(short) == parse_weight_dtype(name) == getattr(torch, name)
        for parse in (parse_dtype, parse_residual_dtype):
            with pytest.raises(InputError) as caught:
                parse(short)
            assert caught.value.what.startswith(f"unknown dtype '{short}'")
            assert caught.value.hint == "use one of float16, bfloat16, float32"


def test_a_residual_may_be_float64() -> None:
    words = ("float64", "fp64", "Double", torch.float64)
    assert {parse_residual_dtype(word) for word in words} == {torch.float64}
    with pytest.raises(InputError, match="unknown dtype 'fp64'"):
        parse_dtype("fp64")
    with pytest.raises(InputError, match="unknown dtype 'float64'"):
        parse_weight_dtype(torch.float64)


def test_unknown_dtypes_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        parse_dtype("flaot16")
    assert caught.value.what == "unknown dtype 'flaot16'; did you mean `float16`?"
    with pytest.raises(InputError) as caught:
        parse_weight_dtype("int8")
    assert caught.value.hint == "use one of float16, bfloat16, float32, float8_e4m3fn, float8_e5m2"


def test_dtype_names_are_those_of_torch() -> None:
    assert set(STORE_DTYPES) < set(WEIGHT_DTYPES_BY_NAME)
    assert all(str(dtype) == f"torch.{name}" for name, dtype in WEIGHT_DTYPES_BY_NAME.items())
