"""The way to encode of a run: chosen by the free memory, kept by its states and by the cache on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectune.errors import InputError
from spectune.model.network import Sdxl
from spectune.training.callbacks import Callbacks, TrainReport
from spectune.training.data import encoding, latents
from spectune.training.data.latents import encode_posteriors
from spectune.training.loop import train
from spectune.training.recipe.recipe import Recipe
from spectune.training.state import load_state
from tests.training.conftest import MakeRecipe


class Messages(Callbacks):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_message(self, text: str) -> None:
        self.texts.append(text)


def trained(recipe: Recipe, messages: Messages | None = None) -> TrainReport:
    return train(recipe, callbacks=[] if messages is None else [messages])


def small_card(monkeypatch: pytest.MonkeyPatch, ways: Sequence[str]) -> None:
    """Make runs choose one way after the other, as if their cards had too little memory."""
    left = list(ways)
    monkeypatch.setattr(encoding, "most_exact_way", lambda *_, **__: left.pop(0))


def encode_of(state: Path) -> str:
    return load_state(state).header.recipe["vae"]["encode"]


def test_auto_is_float32_on_a_cpu(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    messages = Messages()
    report = trained(make_recipe(run={"steps": 1, "save_every_steps": 1}), messages)
    assert "encoding 6 images: float32 (exact)" in messages.texts
    assert not [warning for warning in report.warnings if "encoded" in warning]
    assert encode_of(next((tmp_path / "out").glob("*.state"))) == "float32"


def test_a_resumed_run_encodes_as_before(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_card(monkeypatch, ["bfloat16"])
    report = trained(make_recipe(run={"steps": 1}))
    (warning,) = [warning for warning in report.warnings if "encoded" in warning]
    assert warning.startswith(
        "images are encoded in bfloat16 (latents differ by about 0.7 %), because float32"
    )
    assert 'vae.encode = "bfloat16" makes it independent' in warning
    assert encode_of(tmp_path / "out" / "t-step00000001.state") == "bfloat16"
    messages = Messages()
    trained(make_recipe(run={"steps": 2}), messages)  # nothing is left to choose from
    assert "encoding 6 images: bfloat16 (latents differ by about 0.7 %)" in messages.texts
    with pytest.raises(InputError, match=r'vae\.encode was "bfloat16" and is now "float32"'):
        trained(make_recipe(run={"steps": 3}, vae={"encode": "float32"}))


@pytest.mark.parametrize("cached", [True, False])
def test_values_that_are_not_finite_in_bfloat16_are_encoded_in_tiles(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    def broken(model: Sdxl, pixels: Tensor) -> Tensor:
        encoded = encode_posteriors(model, pixels)
        assert model.vae is not None
        return encoded * torch.nan if model.vae.dtype == torch.bfloat16 else encoded

    monkeypatch.setattr(latents, "encode_posteriors", broken)
    small_card(monkeypatch, ["bfloat16"])
    recipe = make_recipe(run={"steps": 1}, data={"cache_latents": cached})
    if not cached:
        with pytest.raises(InputError, match="latents of a batch are not finite"):
            trained(recipe)
        return
    report = trained(recipe)
    warning = (
        "latents are not finite in bfloat16: all images are encoded in tiles (latents differ by about 2 %)"
    )
    assert warning in report.warnings


@pytest.mark.slow
def test_a_cache_on_disk_is_not_mixed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    shards: list[int] = []
    for name, way in (("a", "float32"), ("b", "bfloat16"), ("c", "tiles"), ("d", "bfloat16")):
        keys: dict[str, Any] = {"cache_folder": tmp_path / "cache"}
        recipe = make_recipe(run={"steps": 0, "name": name}, data=keys, vae={"encode": way})
        trained(recipe)
        shards.append(len(list((tmp_path / "cache").rglob("[0-9]*.safetensors"))))
    assert shards == [1, 2, 3, 3]


def test_images_that_are_drawn_are_encoded_in_the_same_way(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: list[torch.dtype] = []

    def recorded(model: Sdxl, pixels: Tensor) -> Tensor:
        assert model.vae is not None
        dtypes.append(model.vae.dtype)
        return encode_posteriors(model, pixels)

    monkeypatch.setattr(latents, "encode_posteriors", recorded)
    reserved: list[int] = []
    monkeypatch.setattr(
        encoding,
        "most_exact_way",
        lambda *_, reserved_now=reserved, **keys: reserved_now.append(keys["reserved"]) or "bfloat16",
    )
    trained(make_recipe(run={"steps": 1}, data={"cache_latents": False}))
    assert dtypes == [torch.bfloat16]
    assert reserved[0] > 0, "gradients and optimizer state come after the choice"


def test_all_processes_take_the_least_exact_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "gather_object", lambda own: [*own, 1, 0])
    assert encoding._least_exact("float32") == "bfloat16"
    assert encoding._least_exact("tiles") == "tiles"
