"""The tiny model, and a folder of five images with two aspects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from spectune.model.network import Sdxl
from spectune.training.data.buckets import Buckets, Size
from spectune.training.data.dataset import Pictures, Variation
from spectune.training.data.folders import scan_training
from spectune.training.recipe.sections.data import DataSection
from tests.training.conftest import draw

FLIPS = Variation(flip_probability=0.5)
VARIED = Variation(flip_probability=0.5, random_crop=True, color_probability=0.5, cached_variants=3)
SIZES = (Buckets((Size(32, 32), Size(48, 32))),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of five images with two aspects."""
    for index in range(5):
        draw(tmp_path / "images" / "1_x" / f"{index}.png", (60, 40) if index % 2 else (40, 44), seed=index)
    return tmp_path / "images"


def pictures_in(folder: Path, variation: Variation = FLIPS, *, seed: int = 3) -> Pictures:
    return Pictures(scan_training(DataSection(folders=(folder,))).images, SIZES, variation, seed=seed)


@pytest.fixture
def encoded(model: Sdxl, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of images in each call of the encoder."""
    counts: list[int] = []
    assert model.vae is not None
    encode: Callable[[Tensor], Any] = model.vae.encode
    monkeypatch.setattr(model.vae, "encode", lambda pixels: counts.append(len(pixels)) or encode(pixels))
    return counts
