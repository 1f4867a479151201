"""Test that an error about too little memory names what a recipe can still do, and nothing else."""

from __future__ import annotations

import pytest
import torch

from spectune.training.memory import remedies as module
from spectune.training.memory.remedies import remedies
from spectune.training.recipe.recipe import parse_recipe


def lines(**sections: dict[str, object]) -> tuple[str, ...]:
    data: dict[str, dict[str, object]] = {
        "model": {"base": "my base.safetensors", "rank": 64},
        "data": {"folders": ["pictures"], "resolution_px": 1024},
        "run": {
            "name": "style",
            "output": "runs",
            "steps": 10,
            "batch": 4,
            "accumulation": 2,
            "precision": "fp32",
        },
    }
    for name, keys in sections.items():
        data[name] = {**data.get(name, {}), **keys}
    return remedies(parse_recipe(data))


def test_all_remedies_in_order_of_cost() -> None:
    assert lines() == (
        "run.gradient_checkpointing = true",
        'run.precision = "bf16"',
        'run.offload = ["vae"]',  # the text encoders are trained
        "run.batch = 1 with run.accumulation = 8",
        "run.stream = true",
        'model.form = "residual" with model.quantize = "nf4"',
        'model.parts = ["unet"]',
        "a smaller data.resolution_px",
        "a smaller model.rank",
        '`spectune plan "my base.safetensors"` finds settings that fit this card',
    )


def test_frozen_encoders_can_be_offloaded() -> None:
    assert 'run.offload = ["text", "vae"]' in lines(model={"parts": ["unet"]})


def test_settings_that_the_recipe_has_are_not_named() -> None:
    lean = lines(
        model={"parts": ["unet"], "form": "residual", "quantize": "nf4"},
        data={"resolution_px": 512},
        run={
            "gradient_checkpointing": True,
            "precision": "bf16",
            "offload": ["vae", "text"],
            "stream": True,
            "batch": 1,
            "accumulation": 1,
        },
    )
    assert lean[:-1] == ("a smaller model.rank",)


def test_settings_that_the_recipe_does_not_allow_are_not_named() -> None:
    aligned = lines(model={"frame": "data"}, data={"cache_latents": False}, run={"compile": True})
    assert not any(word in line for line in aligned for word in ("residual", "offload", "stream"))


def test_a_card_without_bf16_gets_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "drawing_dtype", lambda device: torch.float16)
    assert not any("bf16" in line for line in lines())
