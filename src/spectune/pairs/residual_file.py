"""Read and write what a residual file stores besides weights: exceptions, original dtypes, layer count.

Exceptions are the few weights that residual + principal does not restore exactly. The tensor
`spectune.exceptions.<tensor>` is uint8 (count, 4 + bytes of a weight): the position in the flattened tensor
as a little-endian int32, then the weight itself. uint8 needs no alignment in the file. Programs that load the
residual as a checkpoint skip unknown names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from spectune.core.residual import Exceptions
from spectune.errors import InputError
from spectune.files.dtypes import DTYPES_BY_SAFETENSORS_NAME, SAFETENSORS_NAMES
from spectune.files.provenance import PREFIX
from spectune.files.source import WeightSource
from spectune.files.text import load_json

EXCEPTIONS = f"{PREFIX}exceptions."
BASE_DTYPES_KEY = f"{PREFIX}base_dtypes"
LAYER_COUNT_KEY = f"{PREFIX}layers"  # number of layers whose principal was taken out
PRINCIPAL_DTYPE_KEY = f"{PREFIX}principal_dtype"  # of its factors, by safetensors' name
HEADER_BYTES = 192  # upper bound of the header entry of one exceptions tensor
_SPLIT_AGAIN = "split the model again"


def exceptions_name(tensor: str) -> str:
    """Return the name of the tensor that holds the exceptions of `tensor`."""
    return EXCEPTIONS + tensor


def is_exceptions(name: str) -> bool:
    """Return whether a tensor of this name holds exceptions."""
    return name.startswith(EXCEPTIONS)


def to_bytes(parts: Sequence[tuple[int, Exceptions]]) -> Tensor:
    """Pack the exceptions of a tensor; each part comes with the position where its layer begins."""
    index = torch.cat([part.index + start for start, part in parts])
    values = torch.cat([part.values for _, part in parts])
    places = index.to(torch.int32)[:, None].view(torch.uint8)
    return torch.cat([places, values[:, None].view(torch.uint8)], dim=1)


def read_exceptions(residual: WeightSource, tensor: str, dtype: torch.dtype) -> Exceptions | None:
    """Unpack the exceptions of a tensor with weights of `dtype`; return None if it has none."""
    name = exceptions_name(tensor)
    info = residual.tensors.get(name)
    if info is None:
        return None
    if info.dtype != torch.uint8 or len(info.shape) != 2 or info.shape[1] != 4 + dtype.itemsize:
        raise InputError(
            f"{name} of {residual.label} is {info.dtype} {info.shape}: "
            f"expected uint8 (count, {4 + dtype.itemsize})",
            hint=_SPLIT_AGAIN,
        )
    packed = residual.load(name)
    index = packed[:, :4].contiguous().view(torch.int32)[:, 0].long()
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < residual.tensors[tensor].numel:
        raise InputError(
            f"{name} of {residual.label} contains positions outside of {tensor}", hint=_SPLIT_AGAIN
        )
    return Exceptions(index, packed[:, 4:].contiguous().view(dtype)[:, 0])


def base_dtypes_metadata(dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    """Return the metadata entry with the original dtypes of tensors that are stored in another dtype."""
    if not dtypes:
        return {}
    names = {name: SAFETENSORS_NAMES[dtype] for name, dtype in dtypes.items()}
    return {BASE_DTYPES_KEY: json.dumps(names, separators=(",", ":"))}


def read_base_dtypes(source: WeightSource) -> dict[str, torch.dtype]:
    """Read the original dtypes of tensors stored in another dtype; inverse of base_dtypes_metadata."""
    text = source.metadata.get(BASE_DTYPES_KEY, "{}")
    try:
        names = cast(dict[str, str], load_json(text))
        return {name: DTYPES_BY_SAFETENSORS_NAME[dtype] for name, dtype in names.items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise InputError(
            f"metadata {BASE_DTYPES_KEY} of {source.label} is invalid: expected dtypes by tensor name",
            hint=_SPLIT_AGAIN,
        ) from None
