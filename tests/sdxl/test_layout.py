from __future__ import annotations

import json

import pytest
import torch

from spectune.errors import InputError
from spectune.files.provenance import LAYOUT_KEY
from spectune.files.source import TensorInfo
from spectune.sdxl.layout import hints_metadata, read_hints
from tests.layouts import TINY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "not a JSON object"),
        ("{", "not a JSON object"),
        (json.dumps({"te1_head": 4}), "unknown key `te1_head`; did you mean `te1_heads`?"),
        (json.dumps({"te1_heads": "4"}), "te1_heads is '4': expected a positive integer"),
        (json.dumps({"te1_heads": [4]}), "te1_heads is [4]: expected a positive integer"),
        (json.dumps({"unet_heads": 4}), "unet_heads is 4: expected a list of positive integers"),
        (json.dumps({"unet_heads": [2, 0]}), "expected a list of positive integers"),
    ],
)
def test_invalid_layout_metadata_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_hints({LAYOUT_KEY: text})
    assert message in caught.value.what


def test_layout_metadata_round_trips() -> None:
    assert read_hints(hints_metadata(TINY)) == {
        "unet_heads": [1, 2, 4],
        "te1_heads": 2,
        "te2_heads": 3,
        "unet_norm_groups": 8,
        "vae_norm_groups": 4,
    }


def test_tensor_info_counts_elements_and_bytes() -> None:
    info = TensorInfo("x", torch.float16, (3, 4))
    assert (info.numel, info.nbytes) == (12, 24)
    assert (TensorInfo("s", torch.float32, ()).numel, TensorInfo("z", torch.float32, (0, 3)).nbytes) == (1, 0)
