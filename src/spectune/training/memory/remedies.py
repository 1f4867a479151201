"""What a recipe can still do to need less GPU memory, for the error of a run that ran out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import ValidationError

from spectune.errors import quoted
from spectune.model.device import drawing_dtype, parse_device
from spectune.training.recipe.recipe import Recipe

Change = Mapping[str, Mapping[str, Any]]  # section -> key -> value

SMALLEST_RESOLUTION_PX = 512  # SDXL draws little below it


def _checkpointing(recipe: Recipe) -> Change:
    return {"run": {"gradient_checkpointing": True}}


def _precision(recipe: Recipe) -> Change:
    if recipe.run.precision != "fp32":
        return {}
    lacks_bf16 = drawing_dtype(parse_device(recipe.run.device)) == torch.float16
    return {"run": {"precision": "fp16" if lacks_bf16 else "bf16"}}


def _offload_vae(recipe: Recipe) -> Change:
    return {} if "vae" in recipe.run.offload else {"run": {"offload": [*recipe.run.offload, "vae"]}}


def _offload_all(recipe: Recipe) -> Change:
    both = ["text", "vae"]
    return {} if sorted(recipe.run.offload) == both else {"run": {"offload": both}}


def _batch(recipe: Recipe) -> Change:
    return {"run": {"batch": 1, "accumulation": recipe.run.batch * recipe.run.accumulation}}


def _stream(recipe: Recipe) -> Change:
    return {"run": {"stream": True}}


def _quantize(recipe: Recipe) -> Change:
    return {} if recipe.model.quantize == "nf4" else {"model": {"form": "residual", "quantize": "nf4"}}


def _parts(recipe: Recipe) -> Change:
    return {"model": {"parts": ["unet"]}} if "unet" in recipe.model.parts else {}


# In order of cost: time first, then accuracy, then what is trained. Of the changes in one row, the first
# counts that the recipe does not have yet, and that its other settings allow.
CHANGES: tuple[tuple[Callable[[Recipe], Change], ...], ...] = (
    (_checkpointing,),
    (_precision,),
    (_offload_all, _offload_vae),
    (_batch,),
    (_stream,),
    (_quantize,),
    (_parts,),
)


def remedies(recipe: Recipe) -> tuple[str, ...]:
    """Return the settings that would help, in order of cost, and the command that finds all of them."""
    found = [text for row in CHANGES if (text := _first_valid(recipe, row))]
    if recipe.data.resolution_px > SMALLEST_RESOLUTION_PX:
        found.append("a smaller data.resolution_px")
    if recipe.model.frame_rank is not None:
        found.append("a smaller model.rank")
    return (*found, f"`spectune plan {quoted(recipe.model.checkpoint)}` finds settings that fit this card")


def _first_valid(recipe: Recipe, row: tuple[Callable[[Recipe], Change], ...]) -> str:
    for change in (make(recipe) for make in row):
        if change and _is_new_and_valid(recipe, change):
            keys = [
                f"{section}.{key} = {_toml(value)}"
                for section, values in change.items()
                for key, value in values.items()
            ]
            return " with ".join(keys)
    return ""


def _is_new_and_valid(recipe: Recipe, change: Change) -> bool:
    data = recipe.model_dump(exclude_unset=True)
    for section, values in change.items():
        data[section] = {**data.get(section, {}), **values}
    try:
        changed = Recipe.model_validate(data)
    except ValidationError:
        return False
    return changed != recipe


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
