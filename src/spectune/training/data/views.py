"""How one draw sees a picture."""

from __future__ import annotations

from dataclasses import dataclass

from spectune.training.data.buckets import Placement
from spectune.training.data.color import ColorChange


@dataclass(frozen=True)
class View:
    """A picture of the data set as it is cut out and coloured; `variant` counts those in a cache."""

    image: int  # index into the data set
    placement: Placement
    color: ColorChange | None = None
    variant: int = 0

    @property
    def pixels_name(self) -> str:
        """A name for the pixels of the view, the same in every run: `1100x1024+38+0-1024x1024-mirrored`."""
        at = self.placement
        name = (
            f"{at.resized.width}x{at.resized.height}+{at.left}+{at.top}-{at.target.width}x{at.target.height}"
        )
        if at.flipped:
            name += "-mirrored"
        if self.color is not None:
            # hex: two changes that differ in the last bit are two changes
            name += "".join(f"-{v.hex()}" for v in (self.color.hue, self.color.saturation, self.color.gamma))
        return name
