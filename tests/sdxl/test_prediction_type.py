"""Test that EDM models are refused, and that an assumed prediction type is a warning."""

from __future__ import annotations

import pytest
import torch

from spectune.errors import InputError
from spectune.files.source import MemorySource
from spectune.sdxl.prediction_type import assumed_prediction, check_prediction


@pytest.mark.parametrize("marker", ["edm_mean", "edm_std", "edm_vpred.sigma_max"])
def test_edm_models_are_refused(marker: str) -> None:
    source = MemorySource({marker: torch.tensor(80.0), "v_pred": torch.empty(0)}, {}, "cos.safetensors")
    with pytest.raises(InputError, match=rf"cos\.safetensors is an EDM model \(it has the tensor {marker}\)"):
        check_prediction(source)
    check_prediction(MemorySource({"v_pred": torch.empty(0)}, {}))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("noobaiXL_Vpred10.safetensors", ", but its name suggests v"),
        ("bigasp-flow.safetensors", ", but its name suggests flow"),
        ("my_RF_1.safetensors", ", but its name suggests flow"),
        ("perfect.safetensors", ""),
    ],
)
def test_an_assumption_is_a_warning_with_a_hint_from_the_name(name: str, hint: str) -> None:
    expected = f"{name} does not declare its prediction type: eps is assumed{hint}"
    assert assumed_prediction(MemorySource({}, {}, name)) == expected
    assert assumed_prediction(MemorySource({}, {"modelspec.predict_key": "v"}, name)) is None
