"""Scaled fp8 checkpoints of ComfyUI: the old markers, the new ones, and formats that are not fp8."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectune.checkpoints.open import open_checkpoint
from spectune.cli.app import run
from spectune.errors import FileNote, InputError
from spectune.files.reader import Checkpoint
from spectune.files.source import MemorySource
from spectune.files.writer import write_tensors
from spectune.sdxl.layout import UNET_ROOT, hints_metadata
from tests.layouts import TINY

Tensors = dict[str, Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LINEAR = f"{UNET_ROOT}middle_block.1.proj_in"


def config(kind: str = "float8_e4m3fn") -> Tensor:
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


def quantized(weight: Tensor, fp8: torch.dtype = E4M3, *, by_row: bool = False) -> tuple[Tensor, Tensor]:
    """Scale the largest value to the end of the range, as all converters do."""
    exact = weight.float()
    largest = (
        exact.abs().flatten(1).amax(1).view(-1, *[1] * (exact.dim() - 1)) if by_row else exact.abs().max()
    )
    scale = largest.clamp(min=1e-12) / torch.finfo(fp8).max
    return (exact / scale).to(fp8), scale


def linears(tensors: Mapping[str, Tensor]) -> list[str]:
    found = [name for name, t in tensors.items() if name.startswith(UNET_ROOT) and t.dim() == 2]
    return [name.removesuffix(".weight") for name in found if name.endswith(".weight")]


def old_markers(tensors: Mapping[str, Tensor]) -> Tensors:
    """`scale_weight` beside each weight, with scales of activations and one marker."""
    made = {f"{UNET_ROOT}scaled_fp8": torch.zeros(2).to(E4M3), **tensors}
    for layer in linears(tensors):
        made[f"{layer}.weight"], made[f"{layer}.scale_weight"] = quantized(tensors[f"{layer}.weight"])
        made[f"{layer}.scale_input"] = torch.ones(1)
    return made


def new_markers(tensors: Mapping[str, Tensor]) -> Tensors:
    """`weight_scale` and `comfy_quant` beside each weight; e5m2 and scales by row in some layers."""
    made = dict(tensors)
    for number, layer in enumerate(linears(tensors)):
        fp8 = (E4M3, E5M2)[number % 2]
        weight, scale = quantized(tensors[f"{layer}.weight"], fp8, by_row=number % 3 == 0)
        made[f"{layer}.weight"], made[f"{layer}.weight_scale"] = weight, scale
        made[f"{layer}.comfy_quant"] = config(str(fp8).removeprefix("torch."))
    return made


def saved(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> Path:
    write_tensors(path, dict(tensors), metadata=hints_metadata(TINY) | metadata)
    return path


def opened(path: Path) -> Checkpoint:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FileNote)
        return open_checkpoint(path)


@pytest.mark.parametrize("quantize", [old_markers, new_markers])
def test_weights_are_multiplied_by_their_scales(
    quantize: Callable[[Mapping[str, Tensor]], Tensors], source: MemorySource, tmp_path: Path
) -> None:
    tensors = quantize(source.values)
    with opened(saved(tensors, tmp_path / "x.safetensors")) as checkpoint:
        assert set(checkpoint.tensors) == set(source.values)
        assert checkpoint.metadata == source.metadata
        for layer in linears(source.values):
            weight = tensors[f"{layer}.weight"]
            scale = tensors.get(f"{layer}.scale_weight", tensors.get(f"{layer}.weight_scale"))
            assert scale is not None
            decoded = checkpoint.load(f"{layer}.weight")
            assert decoded.dtype == checkpoint.tensors[f"{layer}.weight"].dtype == torch.float16
            assert torch.equal(decoded, (weight.double() * scale.double()).half())
            # ComfyUI casts both to the dtype it computes in and multiplies there
            comfyui = weight.bfloat16() * scale.bfloat16()
            torch.testing.assert_close(decoded.float(), comfyui.float(), rtol=2**-7, atol=2**-24)
            error = (decoded.float() - source.values[f"{layer}.weight"].float()).norm()
            assert 0 < error < 0.07 * source.values[f"{layer}.weight"].float().norm()
        untouched = f"{UNET_ROOT}input_blocks.0.0.weight"
        assert torch.equal(checkpoint.load(untouched), source.values[untouched])


def test_a_table_in_the_metadata_declares_layers_without_their_prefix(
    source: MemorySource, tmp_path: Path
) -> None:
    weight, scale = quantized(source.values[f"{LINEAR}.weight"])
    bytes_of = {
        **source.values,
        f"{LINEAR}.weight": weight.view(torch.uint8),
        f"{LINEAR}.weight_scale": scale,
    }
    table = json.dumps(
        {"format_version": "1.0", "layers": {"middle_block.1.proj_in": {"format": "float8_e4m3fn"}}}
    )
    path = saved(bytes_of, tmp_path / "x.safetensors", _quantization_metadata=table)
    with opened(path) as checkpoint:
        assert "_quantization_metadata" not in checkpoint.metadata
        assert torch.equal(checkpoint.load(f"{LINEAR}.weight"), (weight.double() * scale.double()).half())


def test_decoded_weights_have_the_dtype_of_most_other_values(source: MemorySource, tmp_path: Path) -> None:
    brain = {name: t.bfloat16() if t.is_floating_point() else t for name, t in source.values.items()}
    with opened(saved(old_markers(brain), tmp_path / "x.safetensors")) as checkpoint:
        assert checkpoint.tensors[f"{LINEAR}.weight"].dtype == torch.bfloat16


def test_commands_read_it_with_one_note_and_write_plain_files(
    source: MemorySource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled = saved(old_markers(source.values), tmp_path / "scaled.safetensors")
    plain = tmp_path / "plain.safetensors"
    assert run(["convert", str(scaled), "-o", str(plain)]) == 0
    message = capsys.readouterr().err
    count = len(linears(source.values))
    assert message.count("note:") == 1
    assert (
        "note: scaled.safetensors is scaled fp8: weights multiplied by their scales and read as float16: "
        f"{count}; scales and markers left out: {2 * count + 1}, {count} of them for activations"
    ) in message
    assert run(["split", str(plain), "--rank", "2", "-o", str(tmp_path / "split")]) == 0
    assert run(["inspect", str(plain)]) == 0
    assert "scaled fp8" not in capsys.readouterr().err
    with open_checkpoint(plain) as written:
        assert set(written.tensors) == set(source.values)


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"comfy_quant": config("nvfp4")}, "it is quantized in another format than fp8: 1 layer in nvfp4"),
        ({"comfy_quant": torch.zeros(9000, dtype=torch.uint8)}, "1 layer in an unknown format"),
        ({"comfy_quant": config()}, f"{LINEAR}.weight is declared as float8_e4m3fn, but has no scale"),
        (
            {"weight_scale": torch.ones(4, 2)},
            "has shape (4, 2), expected one value, or one per row of (4, 4)",
        ),
        ({"weight_scale": torch.ones(4, dtype=torch.uint8)}, "weight_scale is stored in uint8"),
        ({"weight_scale": torch.ones(1), "scale_weight": torch.ones(1)}, "has more than one scale"),
        ({"weight_scale": torch.ones(1), "weight_scale_2": torch.ones(1)}, "has more than one scale"),
        (
            {"weight": torch.zeros(4, 4, dtype=torch.int8), "weight_scale": torch.ones(1)},
            f"{LINEAR}.weight has a scale, but is stored in int8",
        ),
    ],
)
def test_other_formats_are_refused_with_the_reason(extra: Tensors, problem: str, tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(4, 4).to(E4M3), **extra}
    path = saved({f"{LINEAR}.{name}": t for name, t in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert caught.value.what.startswith("x.safetensors is quantized, and its weights cannot be decoded: ")
    assert problem in caught.value.what


def test_a_scale_beside_a_wide_weight_is_a_plain_tensor(tmp_path: Path) -> None:
    tensors = {f"{LINEAR}.weight": torch.ones(4, 4).half(), f"{LINEAR}.scale_weight": torch.ones(1)}
    with open_checkpoint(saved(tensors, tmp_path / "x.safetensors")) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
