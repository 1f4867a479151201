"""Names of the dtypes in options, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping

ALIASES: Mapping[str, str] = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}


def dtype_name(word: object) -> str:
    """Return the long name of a dtype from any of its names or a torch.dtype: bf16 -> bfloat16."""
    name = str(word).removeprefix("torch.").lower()
    return ALIASES.get(name, name)
