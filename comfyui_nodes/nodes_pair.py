"""Load Residual + Principal: load the original model from its two files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths

from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import added_to_residual
from spectune.core.low_rank import LowRank
from spectune.pairs.merged import restored
from spectune.pairs.rules import check_residual_pair
from spectune.sdxl.layers import build_catalogue

from .library import library, progress_bar
from .patching import patched
from .places import NONE, listed_or_none, optional_path, stamp

PATCH, RESTORE = "patch", "restore"


class SpectuneLoadPair:
    """Check that residual and principal belong together and load their sum."""

    CATEGORY = "spectune"
    DESCRIPTION = "Loads a residual checkpoint and its principal LoRA as the original model."
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "residual": (listed_or_none("checkpoints"),),
                "principal": (
                    listed_or_none("loras"),
                    {"tooltip": "The principal, or an adapter that was trained from it."},
                ),
                "method": (
                    [PATCH, RESTORE],
                    {
                        "tooltip": "patch: ComfyUI loads the residual and adds the principal in float32. "
                        "restore: compute the exact original first; this needs memory for the complete model."
                    },
                ),
            },
            "optional": {
                "residual_file": (
                    "STRING",
                    {"forceInput": True, "tooltip": "From Spectune Split. Replaces the choice in the list."},
                ),
                "principal_file": (
                    "STRING",
                    {"forceInput": True, "tooltip": "From Spectune Split. Replaces the choice in the list."},
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, residual: str | None = None, principal: str | None = None, **others: object) -> str:
        stamps = (("checkpoints", residual), ("loras", principal))
        return " ".join(
            stamp(lambda at=kind, it=name: optional_path(at, it or NONE)) for kind, name in stamps
        )

    def load(
        self, residual: str, principal: str, method: str, residual_file: str = "", principal_file: str = ""
    ) -> tuple[Any, Any, Any]:
        residual_path = _chosen("checkpoints", residual_file or residual, "residual")
        principal_path = _chosen("loras", principal_file or principal, "principal")
        if method == RESTORE:
            return _restored(residual_path, principal_path)
        with library():
            products = _checked(residual_path, principal_path)
        model, clip, vae = _loaded(residual_path)
        return (*patched(model, clip, products), vae)


def _chosen(kind: str, name: str, field: str) -> Path:
    path = optional_path(kind, name)
    if path is None:
        raise RuntimeError(
            f"{field} is not set\nhint: choose a file, or connect {field}_file to Spectune Split"
        )
    return path


def _checked(residual: Path, principal: Path) -> dict[str, LowRank]:
    """Return what the principal adds to each layer.

    Raises PairingError with both hashes if the principal belongs to another residual.
    """
    with (
        open_checkpoint(residual) as source,
        open_adapter(principal, build_catalogue(source, all_layers=True)) as adapter,
    ):
        check_residual_pair(source, adapter)
        return {name: added_to_residual(layer) for name, layer in adapter.layers.items()}


def _loaded(path: Path) -> tuple[Any, Any, Any]:
    """Load a checkpoint with ComfyUI's own loader."""
    embeddings = folder_paths.get_folder_paths("embeddings")
    return comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=True, output_clip=True, embedding_directory=embeddings
    )[:3]


def _restored(residual: Path, principal: Path) -> tuple[Any, Any, Any]:
    """Compute the original tensors as `spectune rebuild` does, and load them with ComfyUI's loader."""
    step = progress_bar()
    with (
        library(),
        open_checkpoint(residual) as source,
        open_adapter(principal, build_catalogue(source, all_layers=True)) as adapter,
    ):
        model = restored(source, adapter)
        tensors = {}
        for done, name in enumerate(model.tensors):
            step(done, len(model.tensors), name)
            tensors[name] = model.load(name)
    loaded = comfy.sd.load_state_dict_guess_config(
        tensors,
        output_vae=True,
        output_clip=True,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        metadata=dict(model.metadata),
    )
    if loaded is None:
        raise RuntimeError(f"ComfyUI does not recognize the model of {residual.name}")
    return loaded[:3]
