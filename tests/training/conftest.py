"""A folder of small captioned images, and a recipe that trains the tiny SDXL on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spectune.checkpoints.open import open_checkpoint
from spectune.model.network import Sdxl, build_model
from spectune.training.recipe.recipe import Recipe, parse_recipe


def draw(path: Path, size: tuple[int, int] = (40, 40), *, seed: int = 0) -> None:
    """Draw a smooth random image, which resizing hardly changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six square images, repeated twice, with captions of three tags; and two validation images."""
    parent = tmp_path_factory.mktemp("pictures")
    for index in range(6):
        path = parent / "2_shape" / f"{index}.png"
        draw(path, seed=index)
        path.with_suffix(".txt").write_text(f"shape {index}, red, round\nsecond line\n")
    for index in range(2):
        path = parent / "held_out" / f"h{index}.png"
        draw(path, seed=100 + index)
        path.with_suffix(".txt").write_text(f"shape {index}")
    return parent


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Sdxl:
    """Return the tiny SDXL."""
    with open_checkpoint(tiny_checkpoint) as source:
        return build_model(source)


MakeRecipe = Callable[..., Recipe]
# Linear layers and a convolution: a run with all 192 layers takes more than twice as long.
FEW_LAYERS = {
    "unet": ("unet.*attn2.to_k", "unet.input_blocks.1.0.in_layers.2"),
    "te1": ("te1.*q_proj",),
    "te2": ("te2.*q_proj",),
}


@pytest.fixture
def make_recipe(tiny_checkpoint: Path, picture_folder: Path, tmp_path: Path) -> MakeRecipe:
    """Return a function that makes a recipe for the tiny SDXL; keyword arguments replace keys of sections.

    The default of `model.layers` is `FEW_LAYERS` of the trained parts. The value `...` removes a key.
    """

    def make(**sections: dict[str, Any]) -> Recipe:
        data: dict[str, dict[str, Any]] = {
            "model": {"base": tiny_checkpoint, "rank": 2},
            "data": {"folders": [picture_folder], "resolution_px": 32},
            "optimizer": {"learning_rate": 1e-2},
            "run": {"name": "t", "output": tmp_path / "out", "steps": 3, "batch": 2, "tensorboard": False},
        }
        parts = sections.get("model", {}).get("parts", list(FEW_LAYERS))
        data["model"]["layers"] = [layer for part in parts for layer in FEW_LAYERS[part]]
        for name, keys in sections.items():
            data[name] = {**data.get(name, {}), **keys}
        return parse_recipe(
            {name: {k: v for k, v in keys.items() if v is not ...} for name, keys in data.items()}
        )

    return make


@pytest.fixture
def recipe_for(make_recipe: MakeRecipe, tmp_path: Path) -> Any:
    """Return a function that makes the recipe of a run; runs of equal images per step train the same."""

    def make(name: str, accumulation: int, **sections: Any) -> Recipe:
        run = {"name": "t", "output": tmp_path / name, "steps": 2, "batch": 2, "accumulation": accumulation}
        # AdamW's first steps are lr * g/(|g| + eps): a small eps would amplify rounding errors of g
        optimizer = {"learning_rate": 1e-3, "options": {"eps": 1e-2}}
        data = {"random_crop": True, "flip_probability": 0.5, **sections.pop("data", {})}
        run |= {"device": "cpu", **sections.pop("run", {})}
        return make_recipe(data=data, run=run, optimizer=optimizer, **sections)

    return make
