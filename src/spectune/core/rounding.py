"""Round float32 to the dtype of a file, and check ranges, dtypes and finite values."""

from __future__ import annotations

import torch
from torch import Tensor

from spectune.core.linalg import copy_into, empty, largest_magnitude
from spectune.errors import InputError

# Without integers, which are not weights, and float64, which would be rounded to float32 for computing.
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
# This dtype has no infinity: torch clamps to its largest value, 448. 464 is halfway to 480, the next step.
_CLAMPED_BEYOND = {torch.float8_e4m3fn: 464.0}
STORE_WIDER = "store in bfloat16 or float32"


def rounded(exact: Tensor, dtype: torch.dtype, name: str, *, hint: str = STORE_WIDER) -> Tensor:
    """Return `exact` rounded once to `dtype`; raise InputError for finite values beyond its range."""
    if dtype == exact.dtype:
        return exact
    if exact.device.type == "cpu":
        result = empty(tuple(exact.shape), dtype)
    else:
        result = torch.empty(exact.shape, dtype=dtype, device=exact.device)
    round_into(result, exact, name, hint=hint)
    return result


def round_into(result: Tensor, exact: Tensor, name: str, *, hint: str = STORE_WIDER) -> None:
    """Write `exact` into `result`, rounded as in `rounded`."""
    copy_into(result, exact)
    if result.dtype.itemsize >= exact.dtype.itemsize:
        return
    # most tensors are far from the end of the range; only the others need the slow check
    if result.dtype == torch.bfloat16 or largest_magnitude(exact) <= 0.9 * torch.finfo(result.dtype).max:
        return
    limit = _CLAMPED_BEYOND.get(result.dtype)
    lost = torch.isfinite(exact) & ~torch.isfinite(result.float()) if limit is None else exact.abs() > limit
    if lost.any():
        largest = float(exact[lost].abs().max())
        raise InputError(
            f"{name}: {int(lost.sum())} of {exact.numel()} values, up to {largest:.3g}, exceed the range of "
            f"{dtype_name(result.dtype)}",
            hint=hint,
        )


def round_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 as bfloat16, rounded up or down with probabilities that keep the mean.

    Random bits are added to the 16 that are cut off. Infinity stays; NaN must not occur.
    """
    noise = torch.randint(
        0, 1 << 16, tuple(exact.shape), dtype=torch.int32, device=exact.device, generator=generator
    )
    return noise.add_(exact.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def check_dtype(dtype: torch.dtype, name: str, *, residual: bool = False) -> None:
    """Raise InputError if `dtype` is not a dtype of weights; a residual may also be float64."""
    if dtype not in WEIGHT_DTYPES and not (residual and dtype == torch.float64):
        raise InputError(
            f"{name} is stored in {dtype_name(dtype)}: "
            f"expected one of {', '.join(dtype_name(known) for known in WEIGHT_DTYPES)}",
            hint="use the fp16, bf16 or fp32 version of the model",
        )


def check_finite(weight: Tensor, name: str, *, hint: str) -> None:
    """Raise InputError if a tensor contains NaN or infinity."""
    if not weight.numel() or largest_magnitude(weight) < float("inf"):
        return
    bad = int((~torch.isfinite(weight.float())).sum())
    raise InputError(f"{name}: {bad} of {weight.numel()} values are NaN or infinite", hint=hint)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: `float16` for torch.float16."""
    return str(dtype).removeprefix("torch.")
