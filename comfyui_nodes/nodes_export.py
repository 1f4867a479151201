"""Export LoRA: export a tuned adapter or a tuned checkpoint as a plain LoRA."""

from __future__ import annotations

import logging
from typing import Any

import spectune
from spectune.ops.options.adapter_files import ExportOptions

from .library import library, log_warning, progress_bar
from .places import listed_of_both, listed_or_none, optional_path, path_of_both, stamp, target
from .widgets import list_widget, values, widgets


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
                "name": ("STRING", {"default": "spectune_lora"}),
            },
            "optional": {
                "base": list_widget(listed_or_none("checkpoints"), ExportOptions, "base"),
                **widgets(ExportOptions),
            },
        }

    @classmethod
    def IS_CHANGED(cls, source: str, base: str = "none", **others: object) -> str:
        return f"{stamp(lambda: path_of_both(source))} {stamp(lambda: optional_path('checkpoints', base))}"

    def export(self, source: str, name: str, base: str = "none", **inputs: Any) -> tuple[str]:
        options = values(ExportOptions, inputs)
        tuned, out = path_of_both(source), target("loras", name, overwrite=options.get("force", False))
        with library():
            report = spectune.export(
                tuned,
                out.path,
                base=optional_path("checkpoints", base),
                progress=progress_bar(),
                **options,
            )
        for warning in report.warnings:
            log_warning(warning)
        logging.info(
            "spectune: %s, %d layers, relative error %.2g", out.name, len(report.layers), report.error
        )
        return (out.name,)
