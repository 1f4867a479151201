"""The sizes and files that the stages of benchmarks/gpu.py share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EMBEDDED = Path(__file__).resolve().parents[1] / "demo" / "base.safetensors"
SMALL_PIXELS = 64


@dataclass(frozen=True)
class Settings:
    """The folder of the files of a benchmark, and its size."""

    work: Path
    tiny: bool  # the embedded base, and as few steps as possible

    @property
    def rank(self) -> int:
        return 8 if self.tiny else 64

    @property
    def pixels(self) -> int:
        return SMALL_PIXELS if self.tiny else 1024

    @property
    def steps(self) -> int:
        """Steps of `spectune train` before it is resumed; a save comes after half of them."""
        return 2 if self.tiny else 10

    @property
    def base(self) -> Path:
        """The checkpoint, made by the stage `make`."""
        return EMBEDDED if self.tiny else self.work / "base.safetensors"

    @property
    def principal(self) -> Path:
        """The principal, made by the stage `split`."""
        return self.work / f"{self.base.stem}.principal-r{self.rank}.safetensors"

    @property
    def pictures(self) -> Path:
        """The pictures, made by the stage `make`."""
        return self.work / "pictures"

    @property
    def small_pictures(self) -> Path:
        """Pictures for the embedded base, made by the stage `make`."""
        return self.work / "small_pictures"

    @property
    def memory(self) -> Path:
        """The setups to try with limited memory, made by the stage `plan`."""
        return self.work / "memory.json"

    def recipe(self, name: str, **sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return a recipe for the UNet with the principal. `sections` add keys to its sections."""
        recipe: dict[str, dict[str, Any]] = {
            "model": {"base": str(self.base), "principal": str(self.principal), "parts": ["unet"]},
            "data": {"folders": [str(self.pictures)], "resolution_px": self.pixels},
            "run": {
                "name": name,
                "output": str(self.work / name),
                "precision": "bf16",
                "gradient_checkpointing": True,
                "tensorboard": False,
            },
        }
        for section, keys in sections.items():
            recipe[section] = {**recipe.get(section, {}), **keys}
        return recipe

    def demo_recipe(self, name: str, **run: Any) -> dict[str, dict[str, Any]]:
        """Return a recipe for the embedded base, with the same rank and pictures on every machine."""
        recipe = self.recipe(name, run=run)
        recipe["model"] = {"base": str(EMBEDDED), "rank": 4, "layers": ["unet"], "parts": ["unet"]}
        recipe["data"] = {"folders": [str(self.small_pictures)], "resolution_px": SMALL_PIXELS}
        return recipe
