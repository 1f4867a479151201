"""Spectune Split: write the principal adapter and the residual model of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

from spectune.operation import run_operation
from spectune.ops.options.model_files import SplitOptions
from spectune.ops.split import principal_name, residual_name, split
from spectune.pairs.rank_plan import rank_request, request_label

from .library import library, log_warning, progress_bar
from .places import listed, path_of, put, stamp, target
from .widgets import list_widget, values, widgets


class SpectuneSplit:
    """Write residual and principal, and return their names in ComfyUI's lists."""

    CATEGORY = "spectune"
    DESCRIPTION = "Splits a checkpoint into its principal LoRA and its residual checkpoint."
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("residual_file", "principal_file")
    FUNCTION = "split"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "checkpoint": list_widget(listed("checkpoints"), SplitOptions, "model"),
                "residual_folder": ("STRING", {"default": "", "tooltip": "A folder inside checkpoints."}),
                "principal_folder": ("STRING", {"default": "", "tooltip": "A folder inside loras."}),
            },
            "optional": widgets(SplitOptions, "with_residual"),
        }

    @classmethod
    def IS_CHANGED(cls, checkpoint: str, **others: object) -> str:
        return stamp(lambda: path_of("checkpoints", checkpoint))

    def split(
        self, checkpoint: str, residual_folder: str, principal_folder: str, **inputs: Any
    ) -> tuple[str, str]:
        source = path_of("checkpoints", checkpoint)
        # the name in the list, because the file behind a link may have another name
        stem = PurePath(checkpoint.replace("\\", "/")).stem
        with library():
            options = SplitOptions(
                model=source, progress=progress_bar(), notify=log_warning, **values(SplitOptions, inputs)
            )
            request = rank_request(options.rank, options.conv_rank, options.energy, options.budget)
        name = principal_name(stem, request_label(request))
        principal = target("loras", f"{principal_folder}/{name}", overwrite=options.force)
        residual = target("checkpoints", f"{residual_folder}/{residual_name(stem)}", overwrite=options.force)
        # on the disk of the residual, so that gigabytes are renamed, not copied
        with library(), TemporaryDirectory(prefix=".spectune-", dir=residual.path.parent) as work:
            report = run_operation(split, replace(options, out=Path(work)))
            assert report.residual is not None
            put(report.principal, principal.path)
            put(report.residual, residual.path)
        return residual.name, principal.name
