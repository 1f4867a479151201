from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spectune.checkpoints.open import open_checkpoint
from spectune.core.agreement import compare
from spectune.core.low_rank import product
from spectune.pairs.split_tensor import SplitPlan, split_tensor
from spectune.sdxl.layers import build_catalogue


@pytest.mark.parametrize("residual_dtype", [None, torch.float32])
def test_fused_rows_are_three_layers_of_one_tensor(
    tiny_checkpoint: Path, residual_dtype: torch.dtype | None
) -> None:
    with open_checkpoint(tiny_checkpoint) as base:
        catalogue = build_catalogue(base)
        name = next(name for name, layers in catalogue.by_tensor.items() if len(layers) == 3)
        tensor, layers = base.load(name), catalogue.by_tensor[name]
    split = split_tensor(
        tensor, layers, SplitPlan({layer.name: 4 for layer in layers}, torch.float16, residual_dtype)
    )
    assert [layer.name.rsplit(".", 1)[1] for layer, _ in split.low_ranks] == ["q_proj", "k_proj", "v_proj"]
    assert split.residual.shape == tensor.shape
    assert split.residual.dtype == (residual_dtype or torch.float16)
    principal = torch.cat([product(low_rank) for _, low_rank in split.low_ranks])
    rebuilt = (split.residual.float() + principal).to(torch.float16)
    assert compare(rebuilt, tensor).bit_equal == split.agreement.bit_equal
    assert split.agreement.exact == (residual_dtype is torch.float32)
    # each block is factored separately: its energy is that of its own spectrum
    values = torch.linalg.svdvals(tensor[: layers[0].shape[0]].float()).square()
    assert split.reports[0].energy == pytest.approx(float(values[:4].sum() / values.sum()), rel=1e-5)
