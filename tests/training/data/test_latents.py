from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.model.network import Sdxl, build_model
from spectune.training.data import latents
from spectune.training.data import store as store_module
from spectune.training.data.buckets import Buckets, Size
from spectune.training.data.dataset import Pictures, Variation
from spectune.training.data.folders import scan_training
from spectune.training.data.latents import (
    checked_latents,
    encode_drawn,
    encode_pictures,
    encode_posteriors,
    vae_key,
)
from spectune.training.data.plan import BatchPlan
from spectune.training.data.store import LatentStore
from spectune.training.recipe.sections.data import DataSection
from tests.training.conftest import draw

FLIPS = Variation(flip_probability=0.5)
VARIED = Variation(flip_probability=0.5, random_crop=True, color_probability=0.5, cached_variants=3)
SIZES = (Buckets((Size(32, 32), Size(48, 32))),)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Sdxl:
    with open_checkpoint(tiny_checkpoint) as source:
        return build_model(source)


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


def same(one: dict[tuple[int, bool], Tensor], two: dict[tuple[int, bool], Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_posteriors_are_those_of_the_model(model: Sdxl) -> None:
    assert model.layout.vae is not None
    other = replace(model, layout=replace(model.layout, vae=replace(model.layout.vae, scale=0.5, shift=-0.3)))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, deviation = encode_posteriors(other, pixels).chunk(2, dim=1)
        torch.testing.assert_close(mean, other.encode_images(pixels))
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
        sample = other.encode_images(pixels, torch.Generator().manual_seed(5))
    torch.testing.assert_close(mean + deviation * noise, sample)
    assert not torch.allclose(mean + 1.01 * deviation * noise, sample)


def test_cached_and_uncached_runs_get_the_same_latents(model: Sdxl, folder: Path) -> None:
    cached, uncached = pictures_in(folder), pictures_in(folder)
    cached.latents = encode_pictures(model, cached, flips=FLIPS.flips, seed=3)
    plan = BatchPlan(cached.buckets(), batch=2, seed=3)
    shapes = set()
    for draws in [*plan.epoch(0), *plan.epoch(1)]:
        one, two = cached.__getitems__(draws), uncached.__getitems__(draws)
        assert one.latents is not None
        assert two.pixels is not None
        assert (one.captions, one.views) == (two.captions, two.views)
        assert torch.equal(one.time_ids, two.time_ids)
        fresh = encode_drawn(model, two.pixels, two.views, seed=3)
        torch.testing.assert_close(one.latents, fresh, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(one.latents, encode_drawn(model, two.pixels, two.views, seed=4), atol=1e-5)
        shapes.add(one.latents.shape[1:])
    assert len(shapes) == 2


def test_latents_are_the_mode_without_a_seed(model: Sdxl, folder: Path) -> None:
    pictures = pictures_in(folder, Variation())
    encoded_latents = encode_pictures(model, pictures, seed=None)
    assert encoded_latents.keys() == {(image, False) for image in range(5)}
    with torch.no_grad():
        mode = model.encode_images(pictures.pixels(pictures.cached_view(4))[None])[0]
    torch.testing.assert_close(encoded_latents[4, False], mode, rtol=1e-4, atol=1e-5)


def test_variants_are_concatenated(model: Sdxl, folder: Path) -> None:
    pictures = pictures_in(folder, VARIED)
    reports: list[tuple[int, int]] = []
    encoded_latents = encode_pictures(
        model, pictures, flips=VARIED.flips, seed=3, progress=lambda *done: reports.append(done)
    )
    assert reports[-1] == (30, 30)
    channels = encoded_latents[0, False].shape[0] // 3
    for variant in range(3):
        view = pictures.cached_view(1, flipped=True, variant=variant)
        fresh = encode_drawn(model, pictures.pixels(view)[None], [view], seed=3)[0]
        part = encoded_latents[1, True][variant * channels : (variant + 1) * channels]
        torch.testing.assert_close(part, fresh, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variation", [FLIPS, VARIED], ids=["fixed", "varied"])
def test_a_second_run_encodes_nothing(
    model: Sdxl, folder: Path, tmp_path: Path, encoded: list[int], variation: Variation
) -> None:
    views = 5 * 2 * variation.cached_variants
    pictures = pictures_in(folder, variation)
    memory = encode_pictures(model, pictures, flips=variation.flips, seed=3)
    assert sum(encoded) == views
    first = encode_pictures(
        model, pictures, flips=variation.flips, seed=3, store=LatentStore(tmp_path / "cache", "v")
    )
    assert sum(encoded) == 2 * views
    store = LatentStore(tmp_path / "cache", "v")
    second = encode_pictures(
        model, pictures_in(folder, variation), flips=variation.flips, seed=3, store=store
    )
    assert sum(encoded) == 2 * views
    assert store.warnings() == []
    assert same(memory, first)
    assert same(memory, second)


def test_a_cache_can_be_used_with_other_seeds(
    model: Sdxl, folder: Path, tmp_path: Path, encoded: list[int]
) -> None:
    one, two = (
        encode_pictures(model, pictures_in(folder), seed=seed, store=LatentStore(tmp_path / "cache", "v"))
        for seed in (3, 4)
    )
    assert sum(encoded) == 5
    assert not torch.equal(one[0, False], two[0, False])


def test_changed_inputs_are_encoded_again(
    model: Sdxl, folder: Path, tmp_path: Path, encoded: list[int]
) -> None:
    def run(key: str = "v") -> tuple[dict[tuple[int, bool], Tensor], LatentStore]:
        encoded.clear()
        store = LatentStore(tmp_path / "cache", key)
        return encode_pictures(model, pictures_in(folder), seed=3, store=store), store

    before, store = run()
    (folder / "1_x" / "2.png").rename(folder / "1_x" / "old")
    draw(folder / "1_x" / "2.png", (40, 44), seed=99)
    after, _ = run()
    assert sum(encoded) == 1
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {(2, False)}
    (folder / "1_x" / "old").replace(folder / "1_x" / "2.png")
    back, _ = run()
    assert sum(encoded) == 0
    assert same(back, before)

    run("other weights")
    assert sum(encoded) == 5

    file = store.file_of(folder / "1_x" / "0.png")
    file.write_bytes(file.read_bytes()[:-4])
    repaired, store = run()
    assert sum(encoded) == 1
    assert store.damaged == {file}
    assert all(torch.allclose(repaired[key], before[key], rtol=1e-4, atol=1e-5) for key in before)
    run()
    assert sum(encoded) == 0


def test_an_interrupted_cache_continues(
    model: Sdxl, folder: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store_module.write_tensors
    written: list[Path] = []

    def interrupted(path: Path, *args: Any, **kwargs: Any) -> str:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, *args, **kwargs)

    def run(store: LatentStore) -> dict[tuple[int, bool], Tensor]:
        return encode_pictures(model, pictures_in(folder), flips=FLIPS.flips, seed=3, store=store)

    monkeypatch.setattr(store_module, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(LatentStore(tmp_path / "cache", "v"))
    monkeypatch.setattr(store_module, "write_tensors", write)
    encoded.clear()

    store = LatentStore(tmp_path / "cache", "v")
    continued = run(store)
    assert sum(encoded) == (5 - 3) * 2
    assert store.damaged == set()
    uncached = encode_pictures(model, pictures_in(folder), flips=FLIPS.flips, seed=3)
    assert all(torch.allclose(continued[key], uncached[key], rtol=1e-4, atol=1e-5) for key in uncached)


def test_copies_of_an_image_share_a_file(model: Sdxl, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "1_x" / "0.png", folder / "1_x" / "copy.png")
    encode_pictures(model, pictures_in(folder), seed=3, store=LatentStore(tmp_path / "cache", "v"))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 5


def test_the_vae_key_changes_with_everything_that_latents_depend_on(model: Sdxl) -> None:
    assert model.layout.vae is not None
    assert model.vae is not None
    scaled = replace(model, layout=replace(model.layout, vae=replace(model.layout.vae, scale=0.5)))
    shifted = replace(model, layout=replace(model.layout, vae=replace(model.layout.vae, shift=0.5)))
    keys = [vae_key(model), vae_key(scaled), vae_key(shifted)]
    convolution = next(module for module in model.vae.modules() if isinstance(module, nn.Conv2d))
    assert convolution.bias is not None
    convolution.padding_mode = "reflect"
    keys.append(vae_key(model))
    convolution.padding_mode = "zeros"
    with torch.no_grad():
        convolution.bias[0] += 1
        keys.append(vae_key(model))
        convolution.bias[0] -= 1
    assert len(set(keys)) == 5
    assert all(len(key) == 64 for key in keys)
    with pytest.raises(InputError, match="the checkpoint has no VAE"):
        vae_key(replace(model, vae=None))


def test_latents_that_are_not_finite(model: Sdxl, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"the VAE's latents of cat\.png are not finite"):
        checked_latents(torch.tensor([1.0, torch.nan]), "cat.png")
    unbroken = latents.encode_posteriors
    broken: Callable[..., Tensor] = lambda *args: unbroken(*args).index_fill_(0, torch.tensor([1]), torch.inf)  # noqa: E731
    monkeypatch.setattr(latents, "encode_posteriors", broken)
    with pytest.raises(InputError, match=r"the VAE's latents of 2\.png are not finite"):
        encode_pictures(model, pictures_in(folder), seed=3)


def test_each_view_has_its_own_noise(model: Sdxl, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def standard_normal(model: Sdxl, pixels: Tensor) -> Tensor:
        return torch.cat([torch.zeros(len(pixels), 4, 4, 4), torch.ones(len(pixels), 4, 4, 4)], dim=1)

    monkeypatch.setattr(latents, "encode_posteriors", standard_normal)
    pictures = pictures_in(folder, VARIED)
    noise = encode_pictures(model, pictures, flips=VARIED.flips, seed=3)
    rows = torch.cat([variants.reshape(3, 4 * 4 * 4) for variants in noise.values()])
    assert len(rows) == 5 * 2 * 3
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.6
    assert rows.std() == pytest.approx(1, abs=0.05)
