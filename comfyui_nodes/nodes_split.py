"""Spectune Split: write the principal adapter and the residual model of a checkpoint."""

from __future__ import annotations

from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import spectune
from spectune.ops.options.model_files import SplitOptions
from spectune.ops.split import principal_name, residual_name
from spectune.pairs.rank_plan import DEFAULT_RANK

from .library import library, progress_bar
from .places import Target, listed, path_of, put, stamp, target
from .widgets import list_widget, widget

RESIDUAL_TYPES = {"model's own": None, "float32": "float32"}


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
                "rank": widget(SplitOptions, "rank", default=DEFAULT_RANK, min=1),
                "residual_type": list_widget(list(RESIDUAL_TYPES), SplitOptions, "residual_dtype"),
                "layers": list_widget(["default", "all"], SplitOptions, "layers"),
                "residual_folder": ("STRING", {"default": "", "tooltip": "A folder inside checkpoints."}),
                "principal_folder": ("STRING", {"default": "", "tooltip": "A folder inside loras."}),
                "overwrite": widget(SplitOptions, "force"),
            }
        }

    @classmethod
    def IS_CHANGED(cls, checkpoint: str, **others: object) -> str:
        return stamp(lambda: path_of("checkpoints", checkpoint))

    def split(
        self,
        checkpoint: str,
        rank: int,
        residual_type: str,
        layers: str,
        residual_folder: str,
        principal_folder: str,
        overwrite: bool,
    ) -> tuple[str, str]:
        source = path_of("checkpoints", checkpoint)
        # the name in the list, because the file behind a link may have another name
        stem = PurePath(checkpoint.replace("\\", "/")).stem
        residual = target("checkpoints", f"{residual_folder}/{residual_name(stem)}", overwrite=overwrite)
        principal_file = f"{principal_folder}/{principal_name(stem, f'r{rank}')}"
        principal = target("loras", principal_file, overwrite=overwrite)
        # on the disk of the residual, so that gigabytes are renamed, not copied
        with library(), TemporaryDirectory(prefix=".spectune-", dir=residual.path.parent) as work:
            self._split_into(source, Path(work), rank, residual_type, layers, residual, principal)
        return residual.name, principal.name

    def _split_into(
        self,
        source: Path,
        work: Path,
        rank: int,
        residual_type: str,
        layers: str,
        residual: Target,
        principal: Target,
    ) -> None:
        report = spectune.split(
            source,
            work,
            rank=rank,
            residual_dtype=RESIDUAL_TYPES[residual_type],
            layers=(layers,),
            progress=progress_bar(),
        )
        assert report.residual is not None
        put(report.principal, principal.path)
        put(report.residual, residual.path)
