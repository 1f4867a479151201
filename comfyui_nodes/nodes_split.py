"""Spectune Split: the principal adapter and the residual model of a checkpoint."""

from __future__ import annotations

from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import spectune
from spectune.ops.split import principal_name, residual_name

from .library import library, progress_bar
from .places import Target, listed, path_of, put, stamp, target

RESIDUAL_TYPES = {"model's own": None, "float32": "float32"}


class SpectuneSplit:
    """Writes two files that together are the checkpoint, and says by which names the lists show them."""

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
                "checkpoint": (listed("checkpoints"), {"tooltip": "the whole model"}),
                "rank": ("INT", {"default": 64, "min": 1, "max": 4096}),
                "residual_type": (
                    list(RESIDUAL_TYPES),
                    {"tooltip": "float32 gives the model back to the last bit; its file is twice as large"},
                ),
                "layers": (
                    ["default", "all"],
                    {"tooltip": "default: what trainers know; all: also embeddings and ends of the UNet"},
                ),
                "residual_folder": ("STRING", {"default": "", "tooltip": "a folder inside of checkpoints"}),
                "principal_folder": ("STRING", {"default": "", "tooltip": "a folder inside of loras"}),
                "overwrite": ("BOOLEAN", {"default": False}),
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
        # named after the list's entry: behind a link the file itself may be called anything
        stem = PurePath(checkpoint.replace("\\", "/")).stem
        residual = target("checkpoints", f"{residual_folder}/{residual_name(stem)}", overwrite=overwrite)
        principal_file = f"{principal_folder}/{principal_name(stem, f'r{rank}')}"
        principal = target("loras", principal_file, overwrite=overwrite)
        # on the residual's own disk, so that gigabytes are renamed and not copied
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
