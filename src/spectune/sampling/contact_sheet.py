"""Pictures side by side: a contact sheet with captions and PSNR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from spectune.errors import InputError

_MARGIN = 8
_INK, _FAINT, _PAPER = (32, 32, 32), (120, 120, 120), (250, 250, 250)


@dataclass(frozen=True)
class Column:
    """One model's pictures, a row each."""

    label: str
    pictures: Sequence[Image.Image]
    reference: int = 0  # number of the column that its PSNR is measured against


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit pictures; infinite when they are identical.

    Raises InputError when their sizes differ.
    """
    if first.size != second.size:
        raise InputError(f"pictures of different sizes cannot be compared: {first.size} and {second.size}")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    error = float(np.mean(difference**2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def mean_psnr(reference: Sequence[Image.Image], pictures: Sequence[Image.Image]) -> float:
    """PSNR in dB of all pictures together, from their mean squared error; infinite when identical."""
    errors = [10 ** (-psnr(first, second) / 10) for first, second in zip(reference, pictures, strict=True)]
    total = sum(errors) / len(errors)
    return math.inf if total == 0 else -10 * math.log10(total)


def format_psnr(decibel: float) -> str:
    return "identical" if math.isinf(decibel) else f"{decibel:.1f} dB"


def contact_sheet(
    columns: Sequence[Column], captions: Sequence[str], *, cell_px: int = 128, numbers: bool = True
) -> Image.Image:
    """A sheet with a row per caption and a column per model.

    With `numbers`, the PSNR against its reference column stands below each picture and the mean
    below the label; a column that is its own reference gets none.
    Raises InputError when a column lacks a picture.
    """
    for column in columns:
        if len(column.pictures) != len(captions):
            raise InputError(
                f"column {column.label!r} has {len(column.pictures)} pictures for {len(captions)} captions"
            )
    small, plain = (
        ImageFont.load_default(max(10, cell_px // 10)),
        ImageFont.load_default(max(11, cell_px // 9)),
    )
    line = cell_px // 7
    head = 2 * line + _MARGIN
    side = max([0, *(int(plain.getlength(caption)) for caption in captions)]) + 2 * _MARGIN
    side = min(side, 2 * cell_px)
    across, down = cell_px + _MARGIN, cell_px + _MARGIN + (line if numbers else 0)
    sheet = Image.new(
        "RGB", (side + across * len(columns) + _MARGIN, head + down * len(captions) + _MARGIN), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for row, caption in enumerate(captions):
        for index, part in enumerate(_wrapped(caption, plain, side - 2 * _MARGIN)):
            draw.text((_MARGIN, head + row * down + cell_px // 3 + index * line), part, _INK, plain)
    for number, column in enumerate(columns):
        left = side + number * across
        draw.text((left, _MARGIN), column.label, _INK, plain)
        reference = columns[column.reference].pictures
        measured = numbers and column.reference != number
        if measured:
            mean = format_psnr(mean_psnr(reference, column.pictures))
            name = "" if column.reference == 0 else f" to {columns[column.reference].label}"
            draw.text((left, _MARGIN + line), f"{mean}{name}", _FAINT, small)
        for row, picture in enumerate(column.pictures):
            top = head + row * down
            sheet.paste(_fitted(picture, cell_px), (left, top))
            if measured:
                value = format_psnr(psnr(reference[row], picture))
                draw.text((left, top + cell_px), value, _FAINT, small)
    return sheet


def picture_grid(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, cell_px: int = 128, columns: int = 6
) -> Image.Image:
    """Pictures in rows of `columns`, each with its caption below."""
    font = ImageFont.load_default(max(10, cell_px // 10))
    line = cell_px // 8
    across, down = cell_px + _MARGIN, cell_px + 2 * line + _MARGIN
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (across * columns + _MARGIN, down * rows + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = _MARGIN + number % columns * across, _MARGIN + number // columns * down
        sheet.paste(_fitted(picture, cell_px), (left, top))
        for index, part in enumerate(_wrapped(caption, font, cell_px)[:2]):
            draw.text((left, top + cell_px + index * line), part, _INK, font)
    return sheet


def _fitted(picture: Image.Image, cell_px: int) -> Image.Image:
    """The picture in a square cell, its aspect kept."""
    return ImageOps.pad(picture, (cell_px, cell_px), Image.Resampling.LANCZOS, color=_PAPER)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
