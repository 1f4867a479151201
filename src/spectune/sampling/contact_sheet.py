"""Draw pictures side by side: a contact sheet with captions and PSNR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from spectune.errors import InputError, counted
from spectune.sampling.fonts import SheetFont, note_missing

_MARGIN = 8
_INK, _FAINT, _PAPER = (32, 32, 32), (120, 120, 120), (250, 250, 250)


@dataclass(frozen=True)
class Column:
    """A column of a contact sheet: the pictures of one model, one per row."""

    label: str
    pictures: Sequence[Image.Image]
    reference: int = 0  # index of the column to compare with


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two 8-bit pictures in dB; infinite if they are identical.

    Raises:
        InputError: The sizes differ.
    """
    if first.size != second.size:
        raise InputError(f"cannot compare pictures of different sizes: {first.size} and {second.size}")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    error = float(np.mean(difference**2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def mean_psnr(reference: Sequence[Image.Image], pictures: Sequence[Image.Image]) -> float:
    """Return the PSNR in dB of the mean squared error of all pictures; infinite if all are identical."""
    errors = [10 ** (-psnr(first, second) / 10) for first, second in zip(reference, pictures, strict=True)]
    total = sum(errors) / len(errors)
    return math.inf if total == 0 else -10 * math.log10(total)


def format_psnr(decibel: float) -> str:
    """Return a PSNR with its unit, or "identical"."""
    return "identical" if math.isinf(decibel) else f"{decibel:.1f} dB"


def contact_sheet(columns: Sequence[Column], captions: Sequence[str], *, cell_px: int = 128) -> Image.Image:
    """Draw a sheet with one row per caption and one column per model.

    The PSNR against the reference column is printed below each picture, and its mean below the label. A
    column that is its own reference has no numbers.

    Raises:
        InputError: A column has more or fewer pictures than there are captions.
    """
    for column in columns:
        if len(column.pictures) != len(captions):
            raise InputError(
                f"column {column.label!r} has {counted(len(column.pictures), 'picture')} for "
                f"{counted(len(captions), 'caption')}"
            )
    small, plain = SheetFont(max(10, cell_px // 10)), SheetFont(max(11, cell_px // 9))
    line = cell_px // 7
    labels = [plain.wrapped(column.label, cell_px, 2) for column in columns]
    named = _MARGIN + max(map(len, labels), default=1) * line
    head = named + line
    side = min(max([0, *(int(plain.length(caption)) for caption in captions)]), 2 * cell_px) + 2 * _MARGIN
    across, down = cell_px + _MARGIN, cell_px + _MARGIN + line
    sheet, draw = _blank(side + across * len(columns) + _MARGIN, head + down * len(captions) + _MARGIN)
    for row, caption in enumerate(captions):
        lines = plain.wrapped(caption, side - 2 * _MARGIN, cell_px // line)
        top = head + row * down + (cell_px - len(lines) * line) // 2
        _write(draw, (_MARGIN, top), lines, line, plain)
    for number, column in enumerate(columns):
        left = side + number * across
        _write(draw, (left, _MARGIN), labels[number], line, plain)
        mean, *values = _psnr_texts(columns, number)
        small.draw(draw, (left, named), small.shortened(mean, cell_px), _FAINT)
        for row, (picture, value) in enumerate(zip(column.pictures, values, strict=True)):
            top = head + row * down
            sheet.paste(_fitted(picture, cell_px), (left, top))
            small.draw(draw, (left, top + cell_px), value, _FAINT)
    note_missing([*captions, *(column.label for column in columns)])
    return sheet


def _psnr_texts(columns: Sequence[Column], number: int) -> list[str]:
    """Return the mean PSNR of a column, then the PSNR of each picture; empty texts for a reference column."""
    column = columns[number]
    reference = columns[column.reference]
    if column.reference == number:
        return [""] * (1 + len(column.pictures))
    name = "" if column.reference == 0 else f" to {reference.label}"
    pairs = zip(reference.pictures, column.pictures, strict=True)
    mean = format_psnr(mean_psnr(reference.pictures, column.pictures))
    return [f"{mean}{name}", *(format_psnr(psnr(expected, picture)) for expected, picture in pairs)]


def picture_grid(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, cell_px: int = 128, columns: int = 6
) -> Image.Image:
    """Draw pictures in rows of `columns`, each with its caption below."""
    font = SheetFont(max(10, cell_px // 10))
    line = cell_px // 8
    across, down = cell_px + _MARGIN, cell_px + 2 * line + _MARGIN
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet, draw = _blank(across * columns + _MARGIN, down * rows + _MARGIN)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = _MARGIN + number % columns * across, _MARGIN + number // columns * down
        sheet.paste(_fitted(picture, cell_px), (left, top))
        _write(draw, (left, top + cell_px), font.wrapped(caption, cell_px, 2), line, font)
    note_missing(captions)
    return sheet


def _blank(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (width, height), _PAPER)
    return sheet, ImageDraw.Draw(sheet)


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], height: int, font: SheetFont
) -> None:
    left, top = corner
    for index, text in enumerate(lines):
        font.draw(draw, (left, top + index * height), text, _INK)


def _fitted(picture: Image.Image, cell_px: int) -> Image.Image:
    """Scale a picture into a square cell and keep its aspect ratio."""
    return ImageOps.pad(picture, (cell_px, cell_px), Image.Resampling.LANCZOS, color=_PAPER)
