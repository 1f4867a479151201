"""Entry point for ComfyUI if this repository is in its custom_nodes folder; empty elsewhere."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

# a module of ComfyUI alone, which loads it before any node
if "folder_paths" in sys.modules:
    spec = find_spec("spectune")
    if spec is None or spec.loader is None:  # no loader: a folder of that name without the library
        # only src: the repository itself on the path would hide ComfyUI's own package `comfy`
        sys.path.append(str(Path(__file__).parent / "src"))

    from .comfyui_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
