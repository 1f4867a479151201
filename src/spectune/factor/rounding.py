"""The one step in which numbers lose digits: float32 to the type of a file."""

from __future__ import annotations

import torch
from torch import Tensor

from spectune.errors import InputError

# Quantised types may have scales in other tensors; float64 would be computed in float32.
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STORE_WIDER = "store in bfloat16 or float32"


def rounded(exact: Tensor, dtype: torch.dtype, name: str, *, hint: str = STORE_WIDER) -> Tensor:
    """`exact` in `dtype`, rounded once to nearest; raises InputError for numbers beyond its range."""
    result = exact.to(dtype)
    if dtype == exact.dtype:
        return result
    lost = torch.isfinite(exact) & ~torch.isfinite(result)
    if lost.any():
        raise InputError(
            f"{name}: {int(lost.sum())} of {exact.numel()} numbers up to {float(exact.abs().max()):.3g} "
            f"do not fit {dtype_name(dtype)}",
            hint=hint,
        )
    return result


def check_dtype(dtype: torch.dtype, name: str) -> None:
    """Raise InputError when the numbers of a weight may need more than their type to be understood."""
    if dtype not in WEIGHT_DTYPES:
        raise InputError(
            f"{name} is stored in {dtype_name(dtype)}: "
            f"expected one of {', '.join(dtype_name(known) for known in WEIGHT_DTYPES)}",
            hint="get the fp16, bf16 or fp32 form of the model",
        )


def check_finite(weight: Tensor, name: str, *, hint: str) -> None:
    """Raise InputError when a tensor holds NaN or infinity."""
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise InputError(f"{name}: {bad} of {weight.numel()} numbers are NaN or infinite", hint=hint)


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")
