"""Defaults that depend on the size of the base and on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from spectune.sdxl.layout import SDXL, Layout
from spectune.training.recipe import defaults
from spectune.training.recipe.defaults import described_defaults, with_defaults
from spectune.training.recipe.recipe import Recipe
from tests.training.conftest import MakeRecipe


@pytest.fixture
def large_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tiny base look like a full SDXL."""

    def layout(base: object) -> Layout:
        return SDXL

    monkeypatch.setattr(defaults, "infer_layout", layout)


def chosen(recipe: Recipe, device: str = "cpu") -> tuple[Any, ...]:
    recipe = with_defaults(recipe, device)
    run, bucket = recipe.run, recipe.data.bucket
    return (
        run.precision,
        run.gradient_checkpointing,
        bucket.enabled,
        bucket.step_px,
        bucket.sides(recipe.data.resolution_px),
    )


def test_a_small_base_is_trained_in_float32(make_recipe: MakeRecipe) -> None:
    assert chosen(make_recipe()) == ("fp32", False, True, 16, (16, 64))
    assert described_defaults(make_recipe(), with_defaults(make_recipe(), "cpu")) == ""


@pytest.mark.usefixtures("large_base")
def test_a_base_of_the_size_of_sdxl_is_trained_in_16_bits(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(data={"resolution_px": 1024})
    assert chosen(recipe) == ("bf16", True, True, 64, (512, 2048))
    complete = with_defaults(recipe, "cpu")
    assert chosen(complete) == chosen(recipe)
    assert described_defaults(recipe, complete) == (
        "run.precision = bf16, run.gradient_checkpointing = true, run.save_every_minutes = 30"
    )
    assert described_defaults(complete, complete) == ""
    off = with_defaults(make_recipe(run={"save_every_minutes": 0}), "cpu")
    assert off.run.save_every_minutes == 0


@pytest.mark.usefixtures("large_base")
def test_values_of_the_recipe_win(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        data={"resolution_px": 1024, "bucket": {"max_px": 1280}},
        run={"precision": "fp32", "gradient_checkpointing": False},
    )
    assert chosen(recipe) == ("fp32", False, True, 64, (512, 1280))
    off = make_recipe(data={"resolution_px": 1024, "bucket": {"enabled": False}})
    assert chosen(off) == ("bf16", True, False, 64, (512, 2048))
    too_small = make_recipe(data={"resolution_px": 32, "bucket": {"step_px": 64}})
    assert chosen(too_small)[2] is False
    assert chosen(make_recipe(data={"resolution_px": 768}))[3] == 32


@pytest.mark.usefixtures("large_base")
@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_a_card_without_bf16_trains_in_fp16(
    has_bf16: bool, precision: str, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def device(index: object) -> Iterator[None]:
        yield

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert chosen(make_recipe(), "cuda:0")[0] == precision
    assert chosen(make_recipe(), "mps")[0] == "bf16"
