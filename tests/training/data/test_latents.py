from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spectune.errors import InputError
from spectune.model.network import Sdxl
from spectune.training.data import latents
from spectune.training.data.dataset import Variation
from spectune.training.data.latents import (
    checked_latents,
    encode_drawn,
    encode_pictures,
    encode_posteriors,
    vae_key,
)
from spectune.training.data.plan import BatchPlan
from tests.training.data.conftest import VARIED, pictures_in


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
    cached.latents = encode_pictures(model, cached, seed=3)
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
    encoded_latents = encode_pictures(model, pictures, seed=None).tensors
    assert encoded_latents.keys() == set(range(5))
    with torch.no_grad():
        mode = model.encode_images(pictures.pixels(pictures.cached_view(4))[None])[0]
    torch.testing.assert_close(encoded_latents[4], mode, rtol=1e-4, atol=1e-5)


def test_all_variants_are_encoded(model: Sdxl, folder: Path) -> None:
    pictures = pictures_in(folder, VARIED)
    reports: list[tuple[int, int]] = []
    encoded_latents = encode_pictures(model, pictures, seed=3, progress=lambda *done: reports.append(done))
    assert reports[-1] == (30, 30)
    for variant in range(3):
        view = pictures.cached_view(1, flipped=True, variant=variant)
        fresh = encode_drawn(model, pictures.pixels(view)[None], [view], seed=3)[0]
        row = encoded_latents.of(view, pictures.number_of(view))
        torch.testing.assert_close(row, fresh, rtol=1e-4, atol=1e-5)


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
        encode_pictures(model, pictures_in(folder, Variation()), seed=3)


def test_each_view_has_its_own_noise(model: Sdxl, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def standard_normal(model: Sdxl, pixels: Tensor) -> Tensor:
        return torch.cat([torch.zeros(len(pixels), 4, 4, 4), torch.ones(len(pixels), 4, 4, 4)], dim=1)

    monkeypatch.setattr(latents, "encode_posteriors", standard_normal)
    pictures = pictures_in(folder, VARIED)
    noise = encode_pictures(model, pictures, seed=3)
    rows = torch.stack([row.flatten() for row in noise.tensors.values()])
    assert len(rows) == 5 * 2 * 3
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.6
    assert rows.std() == pytest.approx(1, abs=0.05)
