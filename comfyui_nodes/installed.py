"""Check that the library is installed. Imported before the nodes."""

from __future__ import annotations

from importlib.util import find_spec

_spec = find_spec("spectune")
if _spec is None or _spec.loader is None:  # no loader: a folder of that name without the library
    raise ImportError(
        "the Python of ComfyUI does not have the library spectune, which the spectune nodes need\n"
        "hint: with the Python of ComfyUI, run `pip install spectune`, or `pip install -e FOLDER` for a "
        "clone; or put the complete clone into custom_nodes"
    )
