"""Count the kernels that a GPU would launch, on any device."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that allocate or look, but compute nothing.
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "is_same_size",
    "resize_",
    "set_",
    "_reshape_alias",
}
# Limits of multi_tensor_apply (ATen/native/cuda/MultiTensorApply.cuh): tensors per launch by the number of
# lists, blocks per launch, values per block.
_TENSORS, _BLOCKS, _CHUNK = (110, 64, 48, 36, 30), 320, 65536


class Launches(TorchDispatchMode):
    """Counts one launch for each operation that computes; views and allocations are none.

    `_foreach_` and `_fused_` operations count as multi_tensor_apply launches them on CUDA.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.by_name.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name in _FREE or _is_view(func):
            return result
        lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
        many = name.startswith(("_foreach_", "_fused_")) and lists
        self.by_name[name] += _multi_tensor_launches(lists[0], len(lists)) if many else 1
        return result


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _multi_tensor_launches(tensors: list[Tensor], lists: int) -> int:
    limit = _TENSORS[min(lists, len(_TENSORS)) - 1]
    launches = waiting = blocks = 0
    for tensor in tensors:
        waiting += 1
        for chunk in range(math.ceil(tensor.numel() / _CHUNK)):
            blocks += 1
            ends = (chunk + 1) * _CHUNK >= tensor.numel()
            if blocks == _BLOCKS or (ends and waiting == limit):
                launches, blocks, waiting = launches + 1, 0, 0 if ends else 1
    return launches + (blocks > 0)
