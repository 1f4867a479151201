"""The few numbers that a residual and its principal cannot give back, as tensors of the residual's file.

`spectune.exceptions.<tensor>` is uint8 (count, 4 + bytes of a number): the place in the tensor, row by row,
as a little-endian int32, and the number itself. Bytes, so that it may stand anywhere in the file; programs
that load the residual as a checkpoint pass over names that they do not know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectune.core.residual import Exceptions
from spectune.errors import InputError
from spectune.files.provenance import PREFIX
from spectune.files.source import WeightSource

EXCEPTIONS = f"{PREFIX}exceptions."
HEADER_BYTES = 192  # what one such tensor takes in the header, at most


def exceptions_name(tensor: str) -> str:
    return EXCEPTIONS + tensor


def is_exceptions(name: str) -> bool:
    return name.startswith(EXCEPTIONS)


def to_bytes(parts: Sequence[tuple[int, Exceptions]]) -> Tensor:
    """The exceptions of a tensor from those of its layers, each with the place where its numbers begin."""
    index = torch.cat([part.index + start for start, part in parts])
    values = torch.cat([part.values for _, part in parts])
    places = index.to(torch.int32)[:, None].view(torch.uint8)
    return torch.cat([places, values[:, None].view(torch.uint8)], dim=1)


def read_exceptions(residual: WeightSource, tensor: str, dtype: torch.dtype) -> Exceptions | None:
    """The inverse, for a tensor whose numbers are of `dtype`; None where the file has none."""
    name = exceptions_name(tensor)
    info = residual.tensors.get(name)
    if info is None:
        return None
    if info.dtype != torch.uint8 or len(info.shape) != 2 or info.shape[1] != 4 + dtype.itemsize:
        raise InputError(
            f"{name} of {residual.label} is {info.dtype} {info.shape}: "
            f"expected uint8 (count, {4 + dtype.itemsize})",
            hint="split the model again",
        )
    packed = residual.load(name)
    index = packed[:, :4].contiguous().view(torch.int32)[:, 0].long()
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < residual.tensors[tensor].numel:
        raise InputError(
            f"{name} of {residual.label} points outside of its tensor", hint="split the model again"
        )
    return Exceptions(index, packed[:, 4:].contiguous().view(dtype)[:, 0])
