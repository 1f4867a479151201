"""Sharpness at the training size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from spectune.ops.dataset.measures import at_training_size, sharpness
from spectune.ops.dataset.problems import BLURRED
from spectune.training.data.buckets import Buckets, Size

RNG = np.random.default_rng(0)


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"))


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    checker = np.indices((10, 10)).sum(axis=0) % 2 * np.uint8(100)
    # the Laplacian is +400 or -400 everywhere
    assert sharpness(checker.astype(np.uint8)) == pytest.approx(400**2)
    ramp = np.tile(np.arange(40, dtype=np.uint8), (40, 1))
    assert sharpness(ramp) == 0
    assert sharpness(np.zeros((1, 1), np.uint8)) == 0


def test_a_sharp_subject_before_a_blurred_background_is_sharp() -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (128, 128), dtype=np.uint8))
    blurred = noise.filter(ImageFilter.GaussianBlur(6))
    assert sharpness(levels(blurred)) < BLURRED
    blurred.paste(noise.crop((0, 0, 32, 32)), (40, 40))
    assert sharpness(levels(blurred)) > 100 * BLURRED


def test_large_pictures_are_measured_at_their_training_size() -> None:
    sizes = Buckets((Size(64, 64), Size(96, 48)))
    large = Image.new("RGB", (400, 200))
    assert at_training_size(large, sizes).size == (96, 48)
    small = Image.new("RGB", (30, 20))
    assert at_training_size(small, sizes) is small
    # a soft but large picture is sharp enough for training
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.uint8))
    soft = noise.resize((640, 640), Image.Resampling.BICUBIC)
    assert sharpness(levels(soft)) < BLURRED
    assert sharpness(levels(at_training_size(soft, sizes))) > BLURRED
