"""Slice LoRAs: combine layers of several adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import spectune
from spectune.errors import InputError
from spectune.ops.options.adapter_files import SliceOptions
from spectune.ops.options.values import Slice, parse_slice

from .library import library, log_warning, progress_bar
from .places import listed_or_none, optional_path, path_of, target
from .widgets import help_of, list_widget, values, widgets

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
                "slices": (
                    "STRING",
                    {"multiline": True, "default": _EXAMPLE, "tooltip": help_of(SliceOptions, "slices")},
                ),
                "name": ("STRING", {"default": "spectune_slice"}),
            },
            "optional": {
                "traits": (
                    "STRING",
                    {"multiline": True, "default": "", "tooltip": "Additional traits, as JSON."},
                ),
                "base": list_widget(listed_or_none("checkpoints"), SliceOptions, "base"),
                **widgets(SliceOptions, "slices"),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: object) -> float:
        return float("nan")  # files are named in the text, so always run

    def slice(
        self, slices: str, name: str, traits: str = "", base: str = "none", **inputs: Any
    ) -> tuple[str]:
        options = values(SliceOptions, inputs)
        out = target("loras", name, overwrite=options.get("force", False))
        with library(), _traits_file(traits) as traits_path:
            report = spectune.slice(
                list(read_slices(slices)),
                out.path,
                traits=traits_path,
                base=optional_path("checkpoints", base),
                progress=progress_bar(),
                **options,
            )
        for warning in getattr(report, "warnings", ()):  # none if checkpoints were sliced
            log_warning(warning)
        return (out.name,)


def read_slices(text: str) -> Iterator[Slice]:
    """Parse one slice per line. Empty lines and lines that start with # are skipped."""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        yield parse_slice(line, find=_lora)


def _lora(name: Path) -> Path:
    try:
        return path_of("loras", str(name))
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
