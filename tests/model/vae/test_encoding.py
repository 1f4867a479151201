"""Ways to encode: their memory, their errors, and the choice, with the free memory simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spectune.checkpoints.open import open_checkpoint
from spectune.files.source import TensorInfo
from spectune.model.network import Sdxl, build_model
from spectune.model.vae import encoding, fitting
from spectune.model.vae.encoding import encoder_of, encoding_bytes, most_exact_way
from spectune.model.vae.ways import EncodeWay
from spectune.sdxl.inference import layout_of
from spectune.training.memory.live_bytes import LiveBytes, attention_of_gpus
from spectune.training.memory.meta_model import empty_model

DEMO = Path(__file__).resolve().parents[3] / "demo" / "base.safetensors"


@pytest.fixture(scope="module")
def demo() -> Sdxl:
    with open_checkpoint(DEMO) as source:
        return build_model(source)


@pytest.fixture(scope="module")
def full(full_infos: Mapping[str, TensorInfo]) -> Sdxl:
    return empty_model(layout_of(full_infos), torch.bfloat16)


@pytest.mark.parametrize(("way", "gigabytes"), [("float32", 2.68), ("bfloat16", 1.34), ("tiles", 0.67)])
def test_bytes_of_a_full_autoencoder_are_counted(full: Sdxl, way: EncodeWay, gigabytes: float) -> None:
    assert full.layout.vae is not None
    encoder = encoder_of(full, way)
    assert encoder.vae is not None
    pixels = torch.empty(1, 3, 1024, 1024, device="meta")
    with torch.no_grad(), attention_of_gpus(), LiveBytes(encoder.vae.parameters()) as counter:
        encoder.encode_posteriors(pixels)
    assert counter.peak == pytest.approx(encoding_bytes(full.layout.vae, 1024 * 1024, way), rel=0.03)
    assert counter.peak == pytest.approx(gigabytes * 1e9, rel=0.03)


@pytest.mark.slow
def test_each_way_has_its_error(demo: Sdxl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectune.model.network.TILE_PX", 128)
    picture = Image.open(next((DEMO.parent / "images").rglob("*.webp"))).convert("RGB").resize((256, 256))
    pixels = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        exact = demo.encode_images(pixels)
        errors = [
            float((encoder_of(demo, way).encode_images(pixels) - exact).norm() / exact.norm())
            for way in encoding.ENCODE_WAYS
        ]
    assert errors[0] == 0
    assert 1e-3 < errors[1] < 0.015
    assert errors[1] < errors[2] < 0.06
    assert demo.vae is not None
    assert demo.vae.dtype == torch.float32, "the model is unchanged"


def test_the_most_exact_way_that_fits_is_chosen(demo: Sdxl, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.layout.vae is not None
    pixels = 1024 * 1024
    needed = encoding_bytes(demo.layout.vae, pixels)

    def chosen(free: float | None, dtype: torch.dtype = torch.bfloat16, reserved: int = 0) -> EncodeWay:
        monkeypatch.setattr(encoding, "drawing_dtype", lambda name: dtype)
        monkeypatch.setattr(fitting, "free_bytes", lambda name: free)
        return most_exact_way(demo, pixels, reserved=reserved)

    assert chosen(None) == "float32", "the memory of a CPU is not counted"
    assert chosen(1.11 * needed) == "float32"
    assert chosen(1.11 * needed, reserved=needed // 10) == "bfloat16"
    assert chosen(0.6 * needed) == "bfloat16"
    assert chosen(0.6 * needed, torch.float16) == "tiles"
    assert chosen(1000) == "tiles"


def test_pictures_of_the_size_of_a_tile_are_encoded_exactly(demo: Sdxl) -> None:
    assert demo.layout.vae is not None
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder_of(demo, "tiles").encode_images(pixels), demo.encode_images(pixels))
    layout = replace(demo.layout.vae, channels=(8, 8))
    assert encoding_bytes(layout, 1024, "tiles") == encoding_bytes(layout, 1024)
