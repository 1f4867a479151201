"""The large image set has all images of the archive but those of the validation set."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from experiments import large_data, wide
from experiments.pick_pictures import add
from spectune.errors import InputError


def test_validation_images_are_not_trained_on(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (128, 128), "red").save(picture, "WEBP")
    with tarfile.open(tmp_path / large_data.ARCHIVE, "w") as tar:
        for name in ("teapot", "abacus"):  # teapot is in the validation set
            add(tar, f"fluent_3d/{name}.webp", picture.getvalue())
            add(tar, f"fluent_3d/{name}.txt", name.encode())
    large_data.prepare(tmp_path)
    folder = tmp_path / "all_3d"
    assert [file.name for file in sorted((folder / "train").iterdir())] == ["abacus.txt", "abacus.webp"]
    assert (folder / "held_out" / "teapot.webp").is_file()
    assert Image.open(folder / "train" / "abacus.webp").size == (64, 64)


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fluent_3d\.tar is missing"):
        large_data.prepare(tmp_path)
    with pytest.raises(InputError, match=r"wide\.safetensors is missing") as error:
        wide.prepare(tmp_path)
    assert "--width 2" in str(error.value.hint)
