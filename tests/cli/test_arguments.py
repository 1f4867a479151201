"""Parsing of arguments: dtypes, sizes, models with adapters, captions."""

from pathlib import Path

import pytest
import torch

from spectune.errors import InputError
from spectune.files.dtypes import parse_dtype
from spectune.ops.drawing.pictures import read_captions
from spectune.ops.drawing.specs import ImageSize, ModelSpec, Weighted, parse_model, parse_size, parse_weighted


def test_dtype():
    assert parse_dtype("fp16") is torch.float16
    assert parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(InputError, match="unknown dtype 'flaot32'; did you mean `float32`"):
        parse_dtype("flaot32")


def test_size():
    assert parse_size("1024") == ImageSize(1024, 1024)
    assert parse_size("1216x832") == ImageSize(1216, 832)
    with pytest.raises(InputError, match="cannot parse `size` 'big'"):
        parse_size("big")


@pytest.mark.parametrize(
    ("word", "path", "strength"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("style.safetensors:-1", "style.safetensors", -1.0),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", 1.0),
        (r"C:\loras\style.safetensors:.5", r"C:\loras\style.safetensors", 0.5),
    ],
)
def test_weighted(word, path, strength):
    assert parse_weighted(word) == Weighted(Path(path), strength)


def test_model_with_adapters():
    spec = parse_model("a.safetensors+b.safetensors:0.8+c.safetensors")
    assert spec == ModelSpec(
        Path("a.safetensors"), (Weighted(Path("b.safetensors"), 0.8), Weighted(Path("c.safetensors"), 1.0))
    )
    assert spec.label == "a + b:0.8 + c"
    assert parse_model("plus+minus.safetensors") == ModelSpec(Path("plus+minus.safetensors"), ())


def test_captions_from_arguments_and_file(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("two\n\n  three \n", encoding="utf-8")
    assert read_captions(["one"], file) == ["one", "two", "three"]
    with pytest.raises(InputError, match="no captions"):
        read_captions([], None)
    with pytest.raises(InputError, match="cannot read captions"):
        read_captions([], tmp_path / "none.txt")
