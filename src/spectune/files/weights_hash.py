"""The weights hash identifies a set of tensors, independent of the order and metadata of their file."""

from __future__ import annotations

import hashlib
import sys

import torch
from torch import Tensor

from spectune.files.dtypes import SAFETENSORS_NAMES
from spectune.files.source import WeightSource


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the raw little-endian bytes of a CPU tensor, without a copy if it is contiguous."""
    assert sys.byteorder == "little", "safetensors files are little-endian"
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


class WeightsHasher:
    """A hash of tensors by name that does not depend on their order.

    It is the sha256 over all tensors, sorted by name, of ``name NUL dtype NUL shape NUL`` and the sha256 of
    the tensor's bytes.
    """

    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        shape = "x".join(str(n) for n in tensor.shape)
        head = f"{name}\0{SAFETENSORS_NAMES[tensor.dtype]}\0{shape}\0".encode()
        self._entries[name] = head + hashlib.sha256(tensor_bytes(tensor)).digest()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def copy(self, name: str, other: WeightsHasher) -> None:
        """Copy the entry of a tensor from `other`, for a tensor known to be bit-equal."""
        self._entries[name] = other._entries[name]

    def differing(self, other: WeightsHasher) -> int:
        """Return the number of tensors in this hasher that are missing or different in `other`."""
        return sum(other._entries.get(name) != entry for name, entry in self._entries.items())

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(self._entries[name] for name in sorted(self._entries))).hexdigest()


def weights_hash(source: WeightSource) -> str:
    """Return the hash of all tensors of `source`; reads every tensor once."""
    hasher = WeightsHasher()
    for name in source.tensors:
        hasher.add(name, source.load(name))
    return hasher.hexdigest()
