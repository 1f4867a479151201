"""spectune fine-tunes a whole SDXL checkpoint by training only its principal spectrum.

    import spectune
    spectune.split("model.safetensors", "parts", rank=64)
    spectune.rebuild("style.safetensors", "model.safetensors", "tuned.safetensors")

Functions are those of spectune.api; they load when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectune.api import (
        InputError,
        PairingError,
        SpectuneError,
        convert,
        export,
        inspect,
        rebuild,
        slice,
        split,
        train,
        verify,
    )

__all__ = [
    "InputError",
    "PairingError",
    "SpectuneError",
    "convert",
    "export",
    "inspect",
    "rebuild",
    "slice",
    "split",
    "train",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("spectune.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
