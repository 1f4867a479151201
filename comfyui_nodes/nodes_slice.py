"""Slice LoRAs: combine layers of several adapters."""

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
from spectune.ops.options.adapter_files import SliceOptions
from spectune.ops.options.values import Slice, parse_slice

from .library import library, progress_bar
from .places import listed_or_none, optional_path, path_of, target
from .widgets import list_widget, widget

_EXAMPLE = "style.safetensors:unet:0.8\nface.safetensors:te"


class SpectuneSlice:
    """Combine layers of LoRAs and write the result into the loras folder."""

    CATEGORY = "spectune"
    DESCRIPTION = "Combines layers of LoRAs. Write one FILE[:TRAIT[:WEIGHT]] per line."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("lora_file",)
    FUNCTION = "slice"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "slices": widget(SliceOptions, "slices", multiline=True, default=_EXAMPLE),
                "name": ("STRING", {"default": "spectune_slice"}),
                "overwrite": widget(SliceOptions, "force"),
            },
            "optional": {
                "traits": (
                    "STRING",
                    {"multiline": True, "default": "", "tooltip": "Additional traits, as JSON."},
                ),
                "base": list_widget(listed_or_none("checkpoints"), SliceOptions, "base"),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: object) -> float:
        return float("nan")  # files are named in the text, so always run

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
    """Parse one slice per line. Empty lines and lines that start with # are skipped."""
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
            f"{name} is not in the list of LoRAs", hint="write the name as the node Load LoRA shows it"
        ) from None


@contextmanager
def _traits_file(text: str) -> Iterator[Path | None]:
    """Write the text to a temporary file for the library; yield None for an empty text."""
    if not text.strip():
        yield None
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "traits.json"
        path.write_text(text, encoding="utf-8")
        yield path
