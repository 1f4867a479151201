"""Nodes for ComfyUI. Put this folder or the repository into ComfyUI's custom_nodes folder."""

from __future__ import annotations

from . import installed as installed  # before the nodes: they import the library
from .nodes_deltas import SpectuneApplyDeltas
from .nodes_export import SpectuneExport
from .nodes_pair import SpectuneLoadPair
from .nodes_sampling import SpectuneSampling
from .nodes_slice import SpectuneSlice
from .nodes_split import SpectuneSplit

NODE_CLASS_MAPPINGS = {
    "SpectuneSplit": SpectuneSplit,
    "SpectuneLoadPair": SpectuneLoadPair,
    "SpectuneApplyDeltas": SpectuneApplyDeltas,
    "SpectuneExport": SpectuneExport,
    "SpectuneSlice": SpectuneSlice,
    "SpectuneSampling": SpectuneSampling,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SpectuneSplit": "Spectune Split",
    "SpectuneLoadPair": "Load Residual + Principal",
    "SpectuneApplyDeltas": "Apply Tuned Deltas",
    "SpectuneExport": "Export LoRA",
    "SpectuneSlice": "Slice LoRAs",
    "SpectuneSampling": "Flow Sampling From File",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
