"""The autoencoder within the memory of a device, with the free memory simulated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from spectune.checkpoints.open import open_checkpoint
from spectune.files.source import MemorySource, TensorInfo
from spectune.model import device
from spectune.model.network import Sdxl, build_model, new_vae
from spectune.model.vae import fitting
from spectune.model.vae.fitting import decode_within_memory, decoding_bytes
from spectune.sdxl.inference import layout_of
from spectune.training.memory.live_bytes import LiveBytes, attention_of_gpus

DEMO = Path(__file__).resolve().parents[3] / "demo" / "base.safetensors"


@pytest.fixture(scope="module")
def demo() -> Sdxl:
    with open_checkpoint(DEMO) as source:
        return build_model(source)


def test_bytes_of_a_full_autoencoder_are_counted(full_infos: Mapping[str, TensorInfo]) -> None:
    layout = layout_of(full_infos).vae
    assert layout is not None
    with torch.device("meta"):
        vae = new_vae(layout).requires_grad_(False)
        latents = torch.empty(1, 4, 64, 64)
    with torch.no_grad(), attention_of_gpus(), LiveBytes(vae.parameters()) as decoder:
        vae.decode(latents)
    assert decoder.peak == pytest.approx(decoding_bytes(layout, 512 * 512), rel=0.03)
    # the peak at 1024 px, in GB
    assert decoding_bytes(layout, 1024 * 1024) == pytest.approx(3.22e9, rel=1e-3)


def psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (found - expected).square().mean()))


@pytest.mark.slow
def test_pictures_are_decoded_as_exactly_as_the_memory_allows(
    demo: Sdxl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "drawing_dtype", lambda name: torch.bfloat16)
    monkeypatch.setattr("spectune.model.network.TILE_PX", 64)
    assert demo.layout.vae is not None
    row = torch.randn(4, 24, 24, generator=torch.Generator().manual_seed(0))
    pixels = 96 * 96
    needed = decoding_bytes(demo.layout.vae, pixels)
    told: list[str] = []

    def decoded(free: int | None) -> torch.Tensor:
        told.clear()
        monkeypatch.setattr(fitting, "free_bytes", lambda name: free)
        (picture,) = decode_within_memory(demo, [row], pixels=pixels, notify=told.append)
        return picture

    exact = decoded(None)
    assert torch.equal(exact, demo.decode_latents(row[None]))
    assert torch.equal(decoded(2 * needed), exact)
    assert told == []
    half = decoded(needed)
    assert told[0].startswith("pictures are decoded in bfloat16, because decoding in one piece in float32")
    assert 45 < psnr(half, exact) < 80
    tiled = decoded(needed // 2)
    assert told[0].startswith("pictures are decoded in bfloat16 and tiles of 512 px, because")
    assert 25 < psnr(tiled, exact) < psnr(half, exact)
    assert demo.vae is not None
    assert demo.vae.dtype == torch.float32, "the model is unchanged"


def test_a_card_without_bfloat16_decodes_in_float32(demo: Sdxl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "drawing_dtype", lambda name: torch.float16)
    monkeypatch.setattr(fitting, "free_bytes", lambda name: 1000)
    told: list[str] = []
    row = torch.zeros(4, 8, 8)
    (picture,) = decode_within_memory(demo, [row], pixels=32 * 32, notify=told.append)
    assert told[0].startswith("pictures are decoded in tiles of 512 px, because")
    assert torch.equal(picture, demo.decode_latents(row[None])), "not larger than a tile"


def test_values_that_are_not_finite_are_decoded_in_float32(
    source: MemorySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(source)

    def broken(vae: nn.Module) -> nn.Module:
        return nn.Module.to(new_vae(model.layout.vae), torch.bfloat16).apply(
            lambda module: [parameter.data.fill_(torch.nan) for parameter in module.parameters()]
        )

    monkeypatch.setattr(fitting, "drawing_dtype", lambda name: torch.bfloat16)
    monkeypatch.setattr(fitting, "free_bytes", lambda name: 1000)
    monkeypatch.setattr(fitting, "in_bfloat16", broken)
    told: list[str] = []
    rows = [torch.zeros(4, 8, 8), torch.ones(4, 8, 8)]
    pictures = list(decode_within_memory(model, rows, pixels=64, notify=told.append))
    assert told[1:] == ["the autoencoder's values are not finite in bfloat16: decoding in float32, in tiles"]
    for row, picture in zip(rows, pictures, strict=True):
        assert torch.equal(picture, model.decode_latents(row[None]))


def test_free_memory_includes_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda name: (1_000, 8_000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda name: 2_000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda name: 5_000)
    fraction = {"share": 1.0}
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda name: fraction["share"], raising=False
    )
    assert device.free_bytes("cuda:0") == 4_000
    fraction["share"] = 0.5
    assert device.free_bytes("cuda:0") == 2_000, "this process may use 4,000"
    assert device.free_bytes("cpu") is None
    assert device.free_bytes("mps") is None
