"""Absurd numbers and names that would leave a folder are refused when a recipe is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from spectune.errors import InputError
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.recipe.recipe import Recipe, parse_recipe


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
        ("data.caption", "sidecar", "../../meta/cap.json", "../../../meta/cap.json"),
        ("data.caption", "sidecar", "sub\\cap.jsonl", "sub/../../x.json"),
        ("data.caption", "sidecar", "", "/etc/x.json"),
        ("data.caption", "sidecar", "a b.json", "C:/x.json"),
        ("data.caption", "sidecar", "a.JSON", "a\0.json"),
        ("data.caption", "sidecar", "x" * 95 + ".json", "x" * 96 + ".json"),
    ],
)
def test_names_are_names(section: str, key: str, good: Any, wrong: Any) -> None:
    parsed(section, key, good)
    with pytest.raises(InputError, match=f"`{key}` must"):
        parsed(section, key, wrong)


def unbounded(schema: Any, at: str = "") -> Iterator[str]:
    """Yield the places of numbers without a smallest or a largest value."""
    if isinstance(schema, dict):
        table = cast("dict[str, Any]", schema)
        if table.get("type") in ("integer", "number") and not (
            table.keys() & {"minimum", "exclusiveMinimum"} and table.keys() & {"maximum", "exclusiveMaximum"}
        ):
            yield at
        for key, value in table.items():
            yield from unbounded(value, f"{at}/{key}")
    elif isinstance(schema, list):
        for value in cast("list[Any]", schema):
            yield from unbounded(value, at)


def test_every_number_of_a_recipe_has_limits() -> None:
    assert list(unbounded(Recipe.model_json_schema())) == []
    assert list(unbounded({"a": {"type": "number", "minimum": 0}})) == ["/a"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_number_of_an_optimizer_has_limits(name: str) -> None:
    assert list(unbounded(OPTIMIZERS[name].options.model_json_schema())) == []
