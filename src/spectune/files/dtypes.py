"""Types of numbers by their names."""

from __future__ import annotations

import torch

from spectune.errors import InputError, did_you_mean

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Eight bits hold a whole weight, roughly; for factors and residuals they are too few.
WEIGHT_DTYPES = {**DTYPES, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_SHORT = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}


def parse_dtype(word: str | torch.dtype, known: dict[str, torch.dtype] = DTYPES) -> torch.dtype:
    """A type by its long or short name (float16 = fp16), among those that are known here."""
    if isinstance(word, torch.dtype):
        word = str(word).removeprefix("torch.")
    name = _SHORT.get(word.lower(), word.lower())
    if name not in known:
        raise InputError(
            f"unknown type {word!r}{did_you_mean(name, known)}", hint=f"one of {', '.join(known)}"
        )
    return known[name]


def parse_residual_dtype(word: str | torch.dtype) -> torch.dtype:
    """A storage type; a residual may also be float64, which gives an fp32 model back."""
    if word == torch.float64 or (isinstance(word, str) and word.lower() in ("float64", "fp64", "double")):
        return torch.float64
    return parse_dtype(word)


def parse_weight_dtype(word: str | torch.dtype) -> torch.dtype:
    """The type of a whole model's weights: also float8_e4m3fn (fp8) and float8_e5m2."""
    return parse_dtype(word, WEIGHT_DTYPES)
