"""Simulate the GPU of a Mac: tensors that pretend to be there, without float64 and without decompositions.

Inside `SimulatedMps`, a tensor that is moved to "mps" becomes an `MpsTensor`. Its values stay on the CPU. An
operation that would fail on a Mac fails here: one that makes a float64 tensor, that mixes devices, or that
torch has not implemented there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

MPS = torch.device("mps")
MISSING = {
    "linalg_svd",
    "linalg_qr",
    "linalg_eigh",
    "linalg_eigvalsh",
    "linalg_cholesky_ex",
    "linalg_solve_triangular",
}


class MpsTensor(Tensor):
    """A tensor that says that it is on a Mac's GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS


class SimulatedMps(TorchFunctionMode):
    """The device "mps" for all code in the block."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property: device, dtype, T
            result = func(*args, **kwargs)
            return MPS if isinstance(args[0], MpsTensor) and isinstance(result, torch.device) else result
        leaves, _ = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        devices = [torch.device(leaf) for leaf in leaves if leaf == "mps" or isinstance(leaf, torch.device)]
        moves = name in ("cpu", "to") and (name == "cpu" or bool(devices) or "cpu" in leaves)
        on_mps = any(isinstance(tensor, MpsTensor) for tensor in tensors)
        if name == "to" and len(tensors) == 2:  # tensor.to(other)
            moves, target = True, isinstance(args[1], MpsTensor)
        else:
            target = MPS in devices if moves or devices else on_mps
        others = [tensor for tensor in tensors if not isinstance(tensor, MpsTensor) and tensor.ndim]
        if on_mps and others and not moves and name not in ("copy_", "__get__", "__getitem__"):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if on_mps and name in MISSING:
            raise NotImplementedError(f"{name} is not implemented on mps")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        return tree_map(_on_mps, result) if target else result


def _plain(value: Any) -> Any:
    if isinstance(value, MpsTensor):
        return value.as_subclass(Tensor)
    return torch.device("cpu") if value == "mps" or value == MPS else value


def _on_mps(value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, MpsTensor):
        return value
    if value.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64")
    return value.as_subclass(MpsTensor)
