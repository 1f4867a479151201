"""The one step in which numbers lose digits: float32 to the type of a file."""

from __future__ import annotations

import torch
from torch import Tensor

from spectune.core.linalg import largest_magnitude
from spectune.errors import InputError

# Integer types hold no weights, and float64 would be computed in float32.
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
# torch makes the largest number of what overflows this type, which has no infinity: halfway to the next, 480
_CLAMPED_BEYOND = {torch.float8_e4m3fn: 464.0}
STORE_WIDER = "store in bfloat16 or float32"


def rounded(exact: Tensor, dtype: torch.dtype, name: str, *, hint: str = STORE_WIDER) -> Tensor:
    """`exact` in `dtype`, rounded once to nearest; raises InputError for finite numbers beyond its range."""
    if dtype == exact.dtype:
        return exact
    result = torch.empty(exact.shape, dtype=dtype, device=exact.device)
    round_into(result, exact, name, hint=hint)
    return result


def round_into(result: Tensor, exact: Tensor, name: str, *, hint: str = STORE_WIDER) -> None:
    """Write `exact` into `result`, as `rounded` does."""
    result.copy_(exact)
    if result.dtype.itemsize >= exact.dtype.itemsize:
        return
    # most numbers are far from the end of the range; what rounds up beyond it is found by the slow look
    if result.dtype == torch.bfloat16 or largest_magnitude(exact) <= 0.9 * torch.finfo(result.dtype).max:
        return
    limit = _CLAMPED_BEYOND.get(result.dtype)
    lost = torch.isfinite(exact) & ~torch.isfinite(result.float()) if limit is None else exact.abs() > limit
    if lost.any():
        largest = float(exact[lost].abs().max())
        raise InputError(
            f"{name}: {int(lost.sum())} of {exact.numel()} numbers up to {largest:.3g} "
            f"do not fit {dtype_name(result.dtype)}",
            hint=hint,
        )


def check_dtype(dtype: torch.dtype, name: str, *, residual: bool = False) -> None:
    """Raise InputError when the numbers of a weight may need more than their type to be understood.

    A residual may also be float64.
    """
    if dtype not in WEIGHT_DTYPES and not (residual and dtype == torch.float64):
        raise InputError(
            f"{name} is stored in {dtype_name(dtype)}: "
            f"expected one of {', '.join(dtype_name(known) for known in WEIGHT_DTYPES)}",
            hint="get the fp16, bf16 or fp32 form of the model",
        )


def check_finite(weight: Tensor, name: str, *, hint: str) -> None:
    """Raise InputError when a tensor holds NaN or infinity."""
    if not weight.numel() or largest_magnitude(weight) < float("inf"):
        return
    bad = int((~torch.isfinite(weight.float())).sum())
    raise InputError(f"{name}: {bad} of {weight.numel()} numbers are NaN or infinite", hint=hint)


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")
