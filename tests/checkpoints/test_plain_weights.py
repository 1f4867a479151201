from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.weights_hash import weights_hash
from spectune.files.writer import write_tensors

LINEAR = "model.diffusion_model.middle_block.1.proj_in"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float32])
def test_plain_weights_of_any_dtype_are_accepted(dtype: torch.dtype, tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {f"{LINEAR}.weight": torch.zeros(4, 4).to(dtype)})
    with open_checkpoint(tmp_path / "x.safetensors") as source:
        assert source.tensors[f"{LINEAR}.weight"].dtype == dtype


@pytest.mark.parametrize(
    "name",
    [
        f"{LINEAR}.weight.absmax",
        f"{LINEAR}.weight.quant_map",
        f"{LINEAR}.weight.nested_absmax",
        f"{LINEAR}.weight.quant_state.bitsandbytes__nf4",
        f"{LINEAR}.weight.SCB",
        f"{LINEAR}.SCB",
    ],
)
def test_quantization_state_of_bitsandbytes_is_refused(name: str, tmp_path: Path) -> None:
    weight = torch.zeros(8, 1, dtype=torch.uint8)
    write_tensors(tmp_path / "small.safetensors", {f"{LINEAR}.weight": weight, name: torch.ones(())})
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path / "small.safetensors")
    assert caught.value.what == (
        f"small.safetensors is quantized by bitsandbytes: 1 tensor with quantization state: {name}"
    )
    assert caught.value.hint == "use the fp16, bf16, fp32 or fp8 version of the model"


def test_an_fp8_file_keeps_its_bits(tmp_path: Path) -> None:
    everything = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)  # NaN included
    written = write_tensors(tmp_path / "x.safetensors", {"a": everything, "b": everything.view(16, 16).T})
    with open_checkpoint(tmp_path / "x.safetensors") as source:
        assert torch.equal(source.load("a").view(torch.uint8), everything.view(torch.uint8))
        assert torch.equal(source.load("b").view(torch.uint8), everything.view(torch.uint8).view(16, 16).T)
        assert weights_hash(source) == written


def test_a_gguf_file_is_recognized(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"GGUF" + bytes(range(200, 240)))
    with pytest.raises(
        InputError, match=re.escape("it is a GGUF file, whose weights are quantized")
    ) as caught:
        open_checkpoint(path)
    assert caught.value.hint == "use the .safetensors version of the model in fp16, bf16, fp32 or fp8"
