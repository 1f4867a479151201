"""Limits of what is drawn. They keep mistakes from filling the memory, with room for every real use."""

from __future__ import annotations

SMALLEST_SIDE, LARGEST_SIDE = 8, 16_384  # pixels; attention over the largest picture needs terabytes
MOST_GUIDANCE = 100  # pictures are saturated above a fifth of it
MOST_PICTURES = 1000  # drawn at once
