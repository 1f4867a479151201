from __future__ import annotations

import pytest
import torch

from spectune.adapters.kinds.ia3 import IA3_KIND
from spectune.errors import InputError


def test_factors_of_the_other_side_are_an_error() -> None:
    weight = (6, 4)
    tensors = {"weight": torch.ones(4), "on_input": torch.tensor(True)}
    assert IA3_KIND.read(tensors, None, weight).change(torch.ones(weight), 0.5).eq(0.5).all()
    tensors["on_input"] = torch.tensor(False)
    with pytest.raises(InputError, match="has 4 factors: expected 6, one per output channel"):
        IA3_KIND.read(tensors, None, weight)
