"""Absurd numbers and names that would leave a folder are refused when a recipe is read."""

from __future__ import annotations

from typing import Any

import pytest

from spectune.errors import InputError
from spectune.training.recipe.recipe import parse_recipe


def parsed(section: str, key: str, value: Any) -> None:
    data: dict[str, Any] = {
        "model": {"base": "m.safetensors", "rank": 4},
        "data": {"folders": ["pictures"]},
        "run": {"name": "t", "output": "out", "steps": 1},
    }
    if section == "objective":
        data["objective"] = {"kind": "flow", "start": "warm"}
    place = data
    for name in section.split("."):
        place = place.setdefault(name, {})
    place[key] = value
    if section == "loss.edm2":
        data["loss"]["weighting"] = "edm2"
    if key == "epochs":
        del data["run"]["steps"]
    parse_recipe(data)


@pytest.mark.parametrize(
    ("section", "key", "highest"),
    [
        ("model", "rank", 16_384),
        ("model", "conv_rank", 16_384),
        ("objective", "warm_images", 100_000),
        ("loss.edm2", "fourier_features", 65_536),
        ("optimizer", "warmup_steps", 100_000_000),
        ("run", "steps", 100_000_000),
        ("run", "epochs", 1_000_000),
        ("run", "batch", 100_000),
        ("run", "accumulation", 100_000),
        ("run", "seed", 2**63 - 1),
        ("run", "validation_times", 1000),
        ("run", "save_every_steps", 100_000_000),
        ("data", "workers", 256),
    ],
)
def test_a_number_above_its_limit_is_refused(section: str, key: str, highest: int) -> None:
    parsed(section, key, highest)
    with pytest.raises(InputError, match=rf"\[{section}\] `{key}`: .*less than or equal to {highest}"):
        parsed(section, key, highest + 1)


@pytest.mark.parametrize(
    ("section", "key", "good", "wrong"),
    [
        ("data", "mask_suffix", ".mask.png", "/../x"),
        ("data", "mask_suffix", "-mask.png", "\\..\\x"),
        ("data.caption", "extensions", [".txt", ".png.txt"], [".a/b"]),
        ("data.caption", "extensions", [".tags"], [".txt\n"]),
        ("data.caption", "sidecar", "captions.jsonl", "../../.."),
        ("data.caption", "sidecar", ["../meta_cap.json"], ["../passwords"]),
    ],
)
def test_names_are_names(section: str, key: str, good: Any, wrong: Any) -> None:
    parsed(section, key, good)
    with pytest.raises(InputError, match=f"`{key}` must"):
        parsed(section, key, wrong)
