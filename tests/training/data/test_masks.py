from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from spectune.errors import InputError
from spectune.training.data.buckets import Placement, Size, covering
from spectune.training.data.images import render
from spectune.training.data.masks import is_mask, mask_file, open_mask, render_mask


def ramp(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray((rows * 3 + columns * 7).astype(np.uint8))


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_mask_is_placed_like_its_image(flipped: bool, seed: int) -> None:
    gray = ramp(20, 12)
    placed = covering(Size(20, 12), Size(8, 12)).varied(flipped=flipped, random=Random(seed))

    mask = render_mask(gray, placed, 4)

    image = (render(gray.convert("RGB"), placed)[:1] + 1) / 2
    assert mask.shape == (1, 3, 2)
    torch.testing.assert_close(mask, avg_pool2d(image, 4), rtol=0, atol=1e-6)
    other = covering(Size(20, 12), Size(8, 12)).varied(flipped=not flipped, random=Random(seed))
    assert (mask - render_mask(gray, other, 4)).abs().max() > 0.05


def test_areas_are_averaged() -> None:
    levels = np.zeros((4, 4), dtype=np.uint8)
    levels[:2, :2] = [[255, 0], [51, 0]]
    levels[2:, 2:] = 255
    placement = Placement(Size(4, 4), Size(4, 4), Size(4, 4), 0, 0, flipped=False)
    mask = render_mask(Image.fromarray(levels), placement, 2)
    assert mask[0].flatten().tolist() == pytest.approx([0.3, 0.0, 0.0, 1.0])
    assert mask.dtype == torch.float32


def test_a_mask_of_another_scale_is_resized_with_its_image() -> None:
    left_half = Image.fromarray(np.repeat([[255, 255, 0, 0]], 2, axis=0).astype(np.uint8))
    placed = covering(Size(40, 20), Size(32, 16)).varied(flipped=True)
    mask = render_mask(left_half, placed, 8)
    assert mask[0, 0, [0, -1]].tolist() == pytest.approx([0, 1], abs=0.01)
    assert mask.mean() == pytest.approx(0.5, abs=1e-3)


def test_without_a_mask_all_weights_are_1() -> None:
    mask = render_mask(None, covering(Size(9, 9), Size(16, 32)), 8)
    assert torch.equal(mask, torch.ones(1, 4, 2))


def test_names() -> None:
    assert mask_file(Path("a/cat.webp"), ".mask.png") == Path("a/cat.mask.png")
    assert is_mask(Path("cat.MASK.png"), ".mask.png")
    assert not is_mask(Path("mask.png"), ".mask.png")


def test_masks_with_another_aspect_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cat.mask.png"
    for size in ((300, 201), (100, 66), (100, 67), (600, 401), (3, 2)):
        Image.new("L", size).save(path)
        assert open_mask(path, Size(300, 201)).size == size
    for size in ((201, 300), (300, 210), (100, 70)):
        Image.new("L", size).save(path)
        expected = rf"cat\.mask\.png is {size[0]}x{size[1]}, its image 300x201: expected the same aspect"
        with pytest.raises(InputError, match=expected):
            open_mask(path, Size(300, 201))
    path.write_text("no mask")
    with pytest.raises(InputError, match=r"cat\.mask\.png is not an image that Pillow can read"):
        open_mask(path, Size(300, 201))


def test_16_bit_and_colored_masks_become_gray(tmp_path: Path) -> None:
    path = tmp_path / "cat.mask.png"
    Image.fromarray(np.full((4, 4), 0x4000, dtype=np.uint16)).save(path)
    assert open_mask(path, Size(4, 4)).getpixel((0, 0)) == 64
    Image.new("RGB", (4, 4), (90, 90, 90)).save(path)
    assert open_mask(path, Size(4, 4)).getpixel((0, 0)) == 90
