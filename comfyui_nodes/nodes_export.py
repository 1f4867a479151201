"""Export LoRA: export a tuned adapter or a tuned checkpoint as a plain LoRA."""

from __future__ import annotations

import logging
from typing import Any

import spectune
from spectune.ops.options.adapter_files import ExportOptions

from .library import library, progress_bar
from .places import listed_of_both, listed_or_none, optional_path, path_of_both, stamp, target
from .widgets import list_widget, widget


class SpectuneExport:
    """Write a LoRA into the loras folder and return its name in ComfyUI's list."""

    CATEGORY = "spectune"
    DESCRIPTION = (
        "Writes a plain LoRA from a tuned adapter, or from the difference of a checkpoint and its base."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("lora_file",)
    FUNCTION = "export"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "source": list_widget(listed_of_both(), ExportOptions, "tuned"),
                "rank": widget(ExportOptions, "rank"),
                "keys": widget(ExportOptions, "keys"),
                "dtype": widget(ExportOptions, "dtype"),
                "name": ("STRING", {"default": "spectune_lora"}),
                "overwrite": widget(ExportOptions, "force"),
            },
            "optional": {
                "base": list_widget(listed_or_none("checkpoints"), ExportOptions, "base"),
            },
        }

    @classmethod
    def IS_CHANGED(cls, source: str, base: str = "none", **others: object) -> str:
        return f"{stamp(lambda: path_of_both(source))} {stamp(lambda: optional_path('checkpoints', base))}"

    def export(
        self, source: str, rank: int, keys: str, dtype: str, name: str, overwrite: bool, base: str = "none"
    ) -> tuple[str]:
        tuned, out = path_of_both(source), target("loras", name, overwrite=overwrite)
        with library():
            report = spectune.export(
                tuned,
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
