from __future__ import annotations

import pytest
import torch

from spectune.training.memory.optimizer_state import optimizer_bytes
from spectune.training.optim.kinds import OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_bytes_are_proportional_to_the_tensors(name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    tensors = [torch.zeros(64, 640, device="meta"), torch.zeros(640, 64, device="meta")]
    one = optimizer_bytes(name, tensors, from_zero=True)
    assert one > 0
    assert optimizer_bytes(name, tensors * 3, from_zero=True) == 3 * one
    assert optimizer_bytes(name, [], from_zero=True) == 0


def test_prodigy_stores_the_initial_tensors_unless_they_are_zero() -> None:
    tensor = torch.zeros(64, 640, device="meta")
    zero, nonzero = (optimizer_bytes("prodigy", [tensor], from_zero=zero) for zero in (True, False))
    assert nonzero == pytest.approx(zero + tensor.nbytes, abs=64)
