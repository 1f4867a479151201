"""Slice LoRAs: layers of several adapters put together."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import spectune
from spectune.errors import InputError
from spectune.ops.options.values import Slice, parse_slice

from .library import library, progress_bar
from .places import listed_or_none, optional_path, path_of, target

_EXAMPLE = "style.safetensors:unet:0.8\nface.safetensors:te"


class SpectuneSlice:
    """Writes one adapter of parts of others into the loras folder."""

    CATEGORY = "spectune"
    DESCRIPTION = "Cuts layers out of LoRAs and adds those of several up; one FILE[:TRAIT[:WEIGHT]] a line."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("lora_file",)
    FUNCTION = "slice"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "slices": (
                    "STRING",
                    {
                        "multiline": True,
                        "default": _EXAMPLE,
                        "tooltip": "FILE[:TRAIT[:WEIGHT]], names as in the list of LoRAs; "
                        "traits are te, te1, te2, unet, content, style, a block, a pattern",
                    },
                ),
                "name": ("STRING", {"default": "spectune_slice"}),
                "overwrite": ("BOOLEAN", {"default": False}),
            },
            "optional": {
                "traits": (
                    "STRING",
                    {"multiline": True, "default": "", "tooltip": "traits of your own, as JSON text"},
                ),
                "base": (
                    listed_or_none("checkpoints"),
                    {"tooltip": "only if the model is not of SDXL's size"},
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: object) -> float:
        return float("nan")  # the files stand inside of a text: always run

    def slice(
        self, slices: str, name: str, overwrite: bool, traits: str = "", base: str = "none"
    ) -> tuple[str]:
        out = target("loras", name, overwrite=overwrite)
        with library(), _traits_file(traits) as traits_path:
            report = spectune.slice(
                list(read_slices(slices)),
                out.path,
                traits=traits_path,
                base=optional_path("checkpoints", base),
                force=overwrite,
                progress=progress_bar(),
            )
        for warning in report.warnings:
            logging.warning("spectune: %s", warning)
        return (out.name,)


def read_slices(text: str) -> Iterator[Slice]:
    """The slices of a text, one a line; empty lines and those that begin with # say nothing."""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        piece = parse_slice(line)
        yield replace(piece, path=_lora(str(piece.path)))


def _lora(name: str) -> Path:
    try:
        return path_of("loras", name)
    except FileNotFoundError:
        raise InputError(
            f"{name} is not in the list of LoRAs", hint="write names as Load LoRA shows them"
        ) from None


@contextmanager
def _traits_file(text: str) -> Iterator[Path | None]:
    """The file of traits that the library reads, for as long as it does; None for no text."""
    if not text.strip():
        yield None
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "traits.json"
        path.write_text(text, encoding="utf-8")
        yield path
