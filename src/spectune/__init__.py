"""Fine-tune a full SDXL checkpoint by training only its principal spectrum.

    import spectune
    spectune.split("model.safetensors", "parts", rank=64)
    spectune.rebuild("model.safetensors", "style.safetensors", "tuned.safetensors")

The functions are the commands of the command line, with the same options and defaults (see spectune.ops).
Each module is imported when its function is first used. Every error that a user can fix is a SpectuneError.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectune.errors import InputError, PairingError, SpectuneError
    from spectune.ops.compare import compare
    from spectune.ops.convert import convert
    from spectune.ops.dataset import dataset
    from spectune.ops.dataset.indexing import dataset_index
    from spectune.ops.doctor import doctor
    from spectune.ops.export import export
    from spectune.ops.inspect import inspect
    from spectune.ops.merge import merge
    from spectune.ops.new import new
    from spectune.ops.null import null
    from spectune.ops.plan import plan
    from spectune.ops.rebuild import rebuild
    from spectune.ops.recipe_import import recipe_import
    from spectune.ops.sample import sample
    from spectune.ops.slice import slice
    from spectune.ops.split import split
    from spectune.ops.train import train
    from spectune.ops.verify import verify
    from spectune.training.callbacks import Callbacks
    from spectune.training.recipe.recipe import Recipe

# No library may report how it is used. They read these variables when they are imported.
for _name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")

__all__ = [
    "Callbacks",
    "InputError",
    "PairingError",
    "Recipe",
    "SpectuneError",
    "compare",
    "convert",
    "dataset",
    "dataset_index",
    "doctor",
    "export",
    "inspect",
    "merge",
    "new",
    "null",
    "plan",
    "rebuild",
    "recipe_import",
    "sample",
    "slice",
    "split",
    "train",
    "verify",
]

_ELSEWHERE = {
    "Callbacks": "spectune.training.callbacks",
    "Recipe": "spectune.training.recipe.recipe",
    "dataset_index": "spectune.ops.dataset.indexing",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from spectune.extras import extras_named

    module = "spectune.errors" if name.endswith("Error") else f"spectune.ops.{name}"
    with extras_named():
        return getattr(import_module(_ELSEWHERE.get(name, module)), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
