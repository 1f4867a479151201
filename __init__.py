"""Entry point for ComfyUI when this repository is in its custom_nodes folder. Empty otherwise."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

# Only ComfyUI has this module. It is loaded before any node.
if "folder_paths" in sys.modules:
    spec = find_spec("spectune")
    if spec is None or spec.loader is None:  # no loader: a folder of that name without the library
        # Add only src, so that no other folder of the repository hides a package of ComfyUI.
        sys.path.append(str(Path(__file__).parent / "src"))

    from .comfyui_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
