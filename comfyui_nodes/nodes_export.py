"""Export LoRA: a plain LoRA of a tuned adapter or of a tuned checkpoint."""

from __future__ import annotations

import logging
from typing import Any

import spectune

from .library import library, progress_bar
from .places import listed_of_both, listed_or_none, optional_path, path_of_both, stamp, target


class SpectuneExport:
    """Writes a LoRA into the loras folder, and says by which name the list shows it."""

    CATEGORY = "spectune"
    DESCRIPTION = "Writes a plain LoRA of a tuned adapter, or of what a checkpoint has over its base."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("lora_file",)
    FUNCTION = "export"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "source": (listed_of_both(), {"tooltip": "a tuned adapter, a LoRA, or a tuned checkpoint"}),
                "rank": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 4096,
                        "tooltip": "0: an adapter's full rank, 64 for checkpoints",
                    },
                ),
                "keys": (
                    ["kohya", "comfyui", "diffusers"],
                    {"tooltip": "ComfyUI reads the first two; diffusers has names that it passes over"},
                ),
                "dtype": (["float16", "bfloat16", "float32"],),
                "name": ("STRING", {"default": "spectune_lora"}),
                "overwrite": ("BOOLEAN", {"default": False}),
            },
            "optional": {
                "base": (
                    listed_or_none("checkpoints"),
                    {"tooltip": "what a checkpoint was made from; for an adapter only if not SDXL-sized"},
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, source: str, base: str = "none", **others: object) -> str:
        return f"{stamp(lambda: path_of_both(source))} {stamp(lambda: optional_path('checkpoints', base))}"

    def export(
        self, source: str, rank: int, keys: str, dtype: str, name: str, overwrite: bool, base: str = "none"
    ) -> tuple[str]:
        made_of, out = path_of_both(source), target("loras", name, overwrite=overwrite)
        with library():
            report = spectune.export(
                made_of,
                out.path,
                base=optional_path("checkpoints", base),
                rank=rank or None,
                keys=keys,
                dtype=dtype,
                force=overwrite,
                progress=progress_bar(),
            )
        for warning in report.warnings:
            logging.warning("spectune: %s", warning)
        logging.info(
            "spectune: %s, %d layers, relative error %.2g", out.name, len(report.layers), report.error
        )
        return (out.name,)
