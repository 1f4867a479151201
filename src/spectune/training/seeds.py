"""Derive the seed of every random choice from the seed of the run and the purpose of the choice.

No random state is carried from step to step. The noise of a batch is a function of the run's seed and the
position of the batch; the caption order of an image is a function of seed, epoch and image. A resumed run
therefore needs only its position.
"""

from __future__ import annotations

import hashlib
from random import Random

import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed in 0..2^63-1 for one purpose, independent of the seeds for all other purposes."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def derived_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a torch generator for one purpose, on the CPU so that a run does not depend on its device."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def derived_random(seed: int, *purpose: str | int) -> Random:
    """Return a Python generator for one purpose."""
    return Random(derived_seed(seed, *purpose))
