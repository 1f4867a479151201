"""Check that the library is installed; imported before the nodes."""

from __future__ import annotations

from importlib.util import find_spec

_spec = find_spec("spectune")
if _spec is None or _spec.loader is None:  # no loader: a folder of that name without the library
    raise ImportError(
        "spectune's nodes need the library spectune, which ComfyUI's Python does not have\n"
        "hint: run `pip install spectune`, or `pip install -e FOLDER` for a clone, with ComfyUI's Python; "
        "or put the whole clone into custom_nodes"
    )
