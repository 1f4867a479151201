"""Check that the library and the packages that it needs are installed. Imported before the nodes."""

from __future__ import annotations

from importlib.util import find_spec

# What the nodes import. ComfyUI has all of these but the library.
_NEEDED = ("numpy", "psutil", "pydantic", "spectune", "torch", "yaml")


def _is_installed(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.loader is not None  # no loader: a folder of that name


_missing = [module for module in _NEEDED if not _is_installed(module)]
if _missing:
    raise ImportError(
        f"the Python of ComfyUI does not have {', '.join(_missing)}, which the spectune nodes need\n"
        "hint: with the Python of ComfyUI, run `pip install spectune`, or `pip install FOLDER` for a clone. "
        "This is the core of spectune: it does not change the packages of ComfyUI"
    )
