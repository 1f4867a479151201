"""Test that a base which cannot be trained is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectune.errors import InputError
from spectune.training.recipe.recipe import parse_recipe
from spectune.training.trainable_model import model_warnings

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


def undeclared(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a checkpoint, and its metadata without the prediction type."""
    with safe_open(checkpoint, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if "prediction" not in key}
    return load_file(checkpoint), metadata


def warnings_of(base: Path, **objective: str) -> list[str]:
    recipe = {
        "model": {"base": str(base), "rank": 4},
        "data": {"folders": ["no images are read"], "resolution_px": 64},
        "objective": objective,
        "run": {"name": "a", "output": "o", "steps": 1},
    }
    return model_warnings(parse_recipe(recipe, label="test"))


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (9, "is an inpainting model: the VAE makes latents of 4 channels, but the UNet takes 9"),
        (8, "its VAE makes latents of 4 channels, but the UNet takes 8"),
    ],
)
def test_a_unet_for_other_latents(tiny_checkpoint: Path, tmp_path: Path, channels: int, message: str) -> None:
    tensors, metadata = undeclared(tiny_checkpoint)
    more = torch.zeros(tensors[CONV_IN].shape[0], channels - 4, 3, 3, dtype=tensors[CONV_IN].dtype)
    tensors[CONV_IN] = torch.cat([tensors[CONV_IN], more], 1)
    path = tmp_path / "inpaint.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match=message):
        warnings_of(path)


def test_edm_models_and_assumed_predictions(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors, metadata = undeclared(tiny_checkpoint)
    path = tmp_path / "x_vpred.safetensors"
    save_file(tensors, path, metadata)
    (warning,) = warnings_of(path)
    assert "eps is assumed, but its name suggests v; set objective.kind" in warning
    assert warnings_of(path, kind="v") == []
    save_file(tensors | {"edm_vpred.sigma_max": torch.tensor(80.0)}, path, metadata)
    with pytest.raises(InputError, match="is an EDM model"):
        warnings_of(path)
