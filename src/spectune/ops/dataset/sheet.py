"""The contact sheet of a dataset: each picture with the parts that are cropped away, the worst first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from spectune.ops.dataset.problems import is_blurred, is_cropped, is_tiny
from spectune.ops.dataset.records import DatasetPicture
from spectune.ops.drawing.pictures import save_picture
from spectune.sampling.contact_sheet import picture_grid
from spectune.training.data.images import open_image

MOST_PICTURES = 60
CELL_PX = 192
_COLUMNS = 6
_LONGEST_NAME = 16  # characters of a line
_SHADE, _LINE = (200, 0, 0, 150), (255, 40, 40)


def write_sheet(target: Path, pictures: Sequence[DatasetPicture], doubled: Collection[int]) -> int:
    """Write the sheet and return its number of pictures. `doubled` are the indices of near duplicates."""
    labels = [_labels(picture, doubled=index in doubled) for index, picture in enumerate(pictures)]

    def badness(index: int) -> tuple[bool, float, float]:
        return bool(labels[index]), pictures[index].placement.cropped_share, pictures[index].enlarged

    worst = sorted(range(len(pictures)), key=badness, reverse=True)[:MOST_PICTURES]
    captions = [", ".join([*labels[index], _short(pictures[index].path.name)]) for index in worst]
    drawn = [draw_crop(pictures[index]) for index in worst]
    save_picture(picture_grid(drawn, captions, cell_px=CELL_PX, columns=_COLUMNS), target)
    return len(worst)


def draw_crop(picture: DatasetPicture) -> Image.Image:
    """Return a small copy of the picture in which the parts that training crops away are red."""
    placement = picture.placement
    image = ImageOps.contain(open_image(picture.path), (CELL_PX, CELL_PX))
    across, down = image.width / placement.resized.width, image.height / placement.resized.height
    left, top = round(placement.left * across), round(placement.top * down)
    right = left + round(placement.target.width * across) - 1
    bottom = top + round(placement.target.height * down) - 1
    shaded = Image.alpha_composite(image.convert("RGBA"), Image.new("RGBA", image.size, _SHADE)).convert(
        "RGB"
    )
    shaded.paste(image.crop((left, top, right + 1, bottom + 1)), (left, top))
    if placement.cropped_share:
        ImageDraw.Draw(shaded).rectangle((left, top, right, bottom), outline=_LINE)
    return shaded


def _labels(picture: DatasetPicture, *, doubled: bool) -> list[str]:
    labels: list[str] = []
    if is_cropped(picture):
        labels.append(f"cut {picture.placement.cropped_share:.0%}")
    if is_tiny(picture):
        labels.append(f"x{picture.enlarged:.1f}")
    if is_blurred(picture):
        labels.append("blurred")
    if doubled:
        labels.append("double")
    return labels


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 9]}…{name[-8:]}"
