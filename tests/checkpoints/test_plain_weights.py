from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectune.checkpoints.open import open_checkpoint
from spectune.checkpoints.plain_weights import check_plain_weights
from spectune.errors import InputError
from spectune.files.source import MemorySource
from spectune.files.weights_hash import weights_hash
from spectune.files.writer import write_tensors

LINEAR = "model.diffusion_model.middle_block.1.proj_in"
FP8 = torch.zeros(4, 4).to(torch.float8_e4m3fn)
ONE = torch.ones(())


def refusal(extra: dict[str, Tensor], metadata: dict[str, str] | None = None, weight: Tensor = FP8) -> str:
    source = MemorySource({f"{LINEAR}.weight": weight, **extra}, metadata or {}, "small.safetensors")
    with pytest.raises(InputError) as caught:
        check_plain_weights(source)
    assert caught.value.hint is not None
    assert "use the fp16, bf16, fp32 or fp8 version of the model" in caught.value.hint
    return caught.value.what


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float32])
def test_plain_weights_of_any_dtype_are_accepted(dtype: torch.dtype) -> None:
    check_plain_weights(MemorySource({f"{LINEAR}.weight": torch.zeros(4, 4).to(dtype)}, {}))


@pytest.mark.parametrize(
    "name",
    [
        "scaled_fp8",
        "model.diffusion_model.scaled_fp8",
        f"{LINEAR}.scale_weight",
        f"{LINEAR}.weight_scale",
        f"{LINEAR}.scale_input",
        f"{LINEAR}.input_scale",
        f"{LINEAR}.comfy_quant",
    ],
)
def test_scaled_fp8_that_was_not_decoded_is_refused(name: str) -> None:
    message = refusal({name: ONE})
    assert message.startswith("small.safetensors is quantized, and its weights cannot be decoded: ")
    assert name in message or "1 layer in an unknown format" in message


def test_a_table_of_quantized_layers_is_refused() -> None:
    message = refusal({}, {"_quantization_metadata": "{}"})
    assert message.endswith("their scales are stored separately: metadata _quantization_metadata")


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
def test_quantization_state_of_bitsandbytes_is_refused(name: str) -> None:
    message = refusal({name: ONE}, weight=torch.zeros(8, 1, dtype=torch.uint8))
    assert message == (
        f"small.safetensors is quantized by bitsandbytes: 1 tensor with quantization state: {name}"
    )


def test_a_scale_without_an_fp8_weight_is_a_plain_tensor() -> None:
    half = {f"{LINEAR}.weight": FP8.half(), f"{LINEAR}.scale_weight": ONE}
    check_plain_weights(MemorySource(half, {}))
    check_plain_weights(MemorySource({"other.scale_weight": ONE, f"{LINEAR}.weight": FP8}, {}))


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
