"""What ComfyUI loads when this repository lies in its custom_nodes folder; nothing for anybody else."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

# ComfyUI has this module before it loads any node, and nothing else has one of this name
if "folder_paths" in sys.modules:
    spec = find_spec("spectune")
    if spec is None or spec.loader is None:  # no loader: a folder of that name without the library in it
        # only src: the repository itself on the path would hide ComfyUI's own package `comfy`
        sys.path.append(str(Path(__file__).parent / "src"))

    from .comfyui_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
