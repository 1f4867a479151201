"""Look up dtypes by name: torch's long names, the usual short names, and those of safetensors headers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spectune.core.rounding import WEIGHT_DTYPES, dtype_name
from spectune.errors import InputError, did_you_mean
from spectune.files.dtype_names import ALIASES

SAFETENSORS_NAMES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
DTYPES_BY_SAFETENSORS_NAME: Mapping[str, torch.dtype] = {
    name: dtype for dtype, name in SAFETENSORS_NAMES.items()
}

WEIGHT_DTYPES_BY_NAME: Mapping[str, torch.dtype] = {dtype_name(dtype): dtype for dtype in WEIGHT_DTYPES}
# 8 bits are roughly enough for complete weights, but not for factors and residuals.
STORE_DTYPES: Mapping[str, torch.dtype] = {
    name: dtype for name, dtype in WEIGHT_DTYPES_BY_NAME.items() if dtype.itemsize > 1
}


def parse_dtype(word: str | torch.dtype, allowed: Mapping[str, torch.dtype] = STORE_DTYPES) -> torch.dtype:
    """Return the dtype with this long or short name (float16 = fp16); raise InputError if not allowed."""
    if isinstance(word, torch.dtype):
        word = dtype_name(word)
    name = ALIASES.get(word.lower(), word.lower())
    if name not in allowed:
        raise InputError(
            f"unknown dtype {word!r}{did_you_mean(name, allowed)}", hint=f"use one of {', '.join(allowed)}"
        )
    return allowed[name]


def parse_residual_dtype(word: str | torch.dtype) -> torch.dtype:
    """Parse a dtype for residuals: also float64, which restores a float32 model bit for bit."""
    if word == torch.float64 or (isinstance(word, str) and word.lower() in ("float64", "fp64", "double")):
        return torch.float64
    return parse_dtype(word)


def parse_weight_dtype(word: str | torch.dtype) -> torch.dtype:
    """Parse a dtype for the weights of a complete model: also float8_e4m3fn (fp8) and float8_e5m2."""
    return parse_dtype(word, WEIGHT_DTYPES_BY_NAME)
