"""A view of an image: its crop, orientation, color and cached variant."""

from __future__ import annotations

from dataclasses import dataclass

from spectune.training.data.buckets import Placement
from spectune.training.data.color import ColorChange


@dataclass(frozen=True)
class View:
    """An image with a placement and a color. `variant` is the number of the view in the cache."""

    image: int  # index into the dataset
    placement: Placement
    color: ColorChange | None = None
    variant: int = 0

    @property
    def pixels_name(self) -> str:
        """A name for the pixels of the view, such as `1100x1024+38+0-1024x1024-mirrored`."""
        at = self.placement
        name = (
            f"{at.resized.width}x{at.resized.height}+{at.left}+{at.top}-{at.target.width}x{at.target.height}"
        )
        if at.flipped:
            name += "-mirrored"
        if self.color is not None:
            # hex: changes that differ in the last bit get different names
            name += "".join(f"-{v.hex()}" for v in (self.color.hue, self.color.saturation, self.color.gamma))
        return name
