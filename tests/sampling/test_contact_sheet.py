"""PSNR values computed by hand and the geometry of a contact sheet."""

import math

import pytest
from PIL import Image

from spectune.errors import InputError
from spectune.sampling.contact_sheet import Column, contact_sheet, format_psnr, mean_psnr, picture_grid, psnr


def flat(level: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def test_psnr_by_hand():
    # a constant difference of 5 levels: 20*log10(255/5)
    assert psnr(flat(100), flat(105)) == pytest.approx(20 * math.log10(51))
    assert math.isinf(psnr(flat(7), flat(7)))


def test_mean_psnr_pools_the_squared_errors():
    pooled = mean_psnr([flat(100), flat(100)], [flat(100), flat(105)])
    assert pooled == pytest.approx(10 * math.log10(255**2 / 12.5))


def test_format_psnr():
    assert format_psnr(math.inf) == "identical"
    assert format_psnr(45.678) == "45.7 dB"


def test_pictures_of_different_sizes_are_an_error():
    with pytest.raises(InputError, match="different sizes"):
        psnr(flat(0), flat(0, (8, 8)))


def test_a_sheet_shows_every_picture():
    columns = [Column("one", [flat(10), flat(20)]), Column("two", [flat(30), flat(40)])]
    sheet = contact_sheet(columns, ["cat", "a very long caption that needs several lines"], cell_px=64)
    pixels = sheet.load()
    found = {
        pixels[x, y][0]
        for x in range(0, sheet.width, 2)
        for y in range(0, sheet.height, 2)
        if len(set(pixels[x, y])) == 1
    }
    assert {10, 20, 30, 40} <= found


def test_a_long_caption_stays_in_its_row():
    """The rows below and above a caption that does not fit have no ink."""
    sheet = contact_sheet([Column("one", [flat(0)] * 3)], ["", "red fox, " * 99, ""], cell_px=64)
    ink = [y for y in range(sheet.height) if min(sheet.crop((0, y, 128, y + 1)).tobytes()) < 128]
    down = 64 + 8 + 64 // 7
    head = sheet.height - 8 - 3 * down
    assert head + down <= min(ink) < max(ink) < head + 2 * down


def test_a_missing_picture_is_an_error():
    with pytest.raises(InputError, match="column 'one' has 1 picture for 2 captions"):
        contact_sheet([Column("one", [flat(0)])], ["a", "b"])


def test_a_grid_shows_every_picture():
    grid = picture_grid([flat(level) for level in (10, 20, 30)], ["a", "b", "c"], cell_px=32, columns=2)
    pixels = grid.load()
    found = {pixels[x, y] for x in range(grid.width) for y in range(grid.height)}
    assert {(10, 10, 10), (20, 20, 20), (30, 30, 30)} <= found
    assert grid.width < 3 * 40
