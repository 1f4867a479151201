"""Measure the bytes of an optimizer's state on a real optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import redirect_stderr
from functools import cache
from io import StringIO

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spectune.training.optim.groups import build_optimizer


def optimizer_bytes(name: str, trained: Iterable[Tensor], *, from_zero: bool) -> int:
    """Return the bytes of an optimizer's state after a step, measured once for each shape and dtype.

    Args:
        name: An optimizer of a recipe.
        trained: The tensors to train; they may be on the meta device.
        from_zero: Whether the tensors start at zero. Some optimizers then store no copy of the start values.

    Raises:
        SpectuneError: The package of the optimizer is not installed.
    """
    shapes = Counter((tuple(tensor.shape), tensor.dtype) for tensor in trained)
    return sum(
        count * _state_bytes(name, shape, dtype, from_zero=from_zero)
        for (shape, dtype), count in shapes.items()
    )


@cache
def _state_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype, *, from_zero: bool) -> int:
    sample = nn.Parameter((torch.zeros if from_zero else torch.ones)(shape, dtype=dtype))
    sample.grad = torch.full_like(sample, 1e-3)
    with redirect_stderr(StringIO()):  # some optimizers print notes about small models
        optimizer = build_optimizer(name, [{"params": [sample], "part": "unet"}])
        optimizer.step()
    leaves = tree_leaves(optimizer.state_dict()["state"])
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
