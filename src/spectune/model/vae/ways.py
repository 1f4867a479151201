"""The ways to encode an image, with their errors. This module loads no network library: recipes use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

EncodeWay = Literal["float32", "bfloat16", "tiles"]
ENCODE_WAYS: tuple[EncodeWay, ...] = get_args(EncodeWay)  # the most exact one first
# The difference of latents to those of float32 in one piece (docs/reference/vae.md)
ENCODE_ERRORS: Mapping[EncodeWay, str] = {
    "float32": "exact",
    "bfloat16": "latents differ by about 0.7 %",
    "tiles": "latents differ by about 2 %",
}
