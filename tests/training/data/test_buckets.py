from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spectune.training.data.buckets import (
    Buckets,
    Size,
    bucket_sizes,
    covering,
    nearest_bucket,
    training_buckets,
)
from spectune.training.data.images import render
from spectune.training.recipe.sections.data import DataSection

SIZES = st.builds(Size, st.integers(20, 3000), st.integers(20, 3000))


def test_sdxl_buckets_of_the_guide() -> None:
    sizes = bucket_sizes(1024, minimum=768, maximum=1280, step=64)
    tall = {Size(768, 1280), Size(832, 1216), Size(896, 1152), Size(960, 1088)}
    assert set(sizes) == {Size(1024, 1024)} | tall | {Size(size.height, size.width) for size in tall}


def test_the_nearest_bucket() -> None:
    buckets = bucket_sizes(1024, minimum=768, maximum=1280, step=64)
    assert nearest_bucket(Size(500, 500), buckets) == Size(1024, 1024)
    assert nearest_bucket(Size(100, 900), buckets) == Size(768, 1280)
    assert nearest_bucket(Size(832, 1216), buckets) == Size(832, 1216)


@given(
    st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(64, 8, 8), (1024, 512, 64), (96, 16, 32)])
)
def test_the_search_by_aspect_finds_the_nearest_bucket(
    width: int, height: int, settings: tuple[int, int, int]
) -> None:
    resolution, minimum, step = settings
    sizes = bucket_sizes(resolution, minimum=minimum, maximum=2 * resolution, step=step)
    original = Size(width, height)
    assert Buckets(sizes).fit(original).target == nearest_bucket(original, sizes)


@given(SIZES, SIZES, st.booleans(), st.integers(0, 99))
def test_a_placement_lies_inside_its_image(original: Size, target: Size, flipped: bool, seed: int) -> None:
    for random in (None, Random(seed)):
        placed = covering(original, target).varied(flipped=flipped, random=random)
        assert 0 <= placed.left <= placed.resized.width - target.width
        assert 0 <= placed.top <= placed.resized.height - target.height
        # the resized image covers the target and is no larger than needed
        assert placed.resized.width == target.width or placed.resized.height == target.height
        height, width, top, left, target_height, target_width = placed.time_ids
        assert Size(width, height) == original
        assert Size(target_width, target_height) == target
        assert 0 <= left <= placed.resized.width - target.width
        assert top == placed.top


def test_time_ids_give_the_crop_after_mirroring() -> None:
    original, target = Size(20, 10), Size(8, 10)
    placed = covering(original, target).varied(flipped=True, random=Random(0))
    ramp = Image.new("RGB", (20, 10))
    ramp.putdata([(x, y, 0) for y in range(10) for x in range(20)])
    left = placed.time_ids[3]

    pixels = ((render(ramp, placed) + 1) * 127.5).round().int()  # (3, 10, 8)

    mirrored = torch.arange(20).flip(0)
    assert pixels[0, 0].tolist() == mirrored[left : left + 8].tolist()
    assert placed.time_ids == (10, 20, 0, 12 - placed.left, 10, 8)


def data_section(**keys: Any) -> DataSection:
    return DataSection(folders=(Path("x"),), **{"bucket": {"enabled": True}, **keys})


def test_default_buckets_lose_little_of_60_random_pictures() -> None:
    random = Random(0)
    (buckets,) = training_buckets(data_section())
    sizes = [Size(random.randint(256, 2048), random.randint(256, 2048)) for _ in range(60)]
    mean = sum(buckets.fit(size).cropped_share for size in sizes) / len(sizes)
    print(f"mean area lost of 60 random pictures: {100 * mean:.2f} %")
    assert mean == pytest.approx(0.0395, abs=0.0005)
    assert buckets.fit(Size(1920, 1080)).target == Size(1344, 768)
    assert buckets.fit(Size(832, 1216)).cropped_share == 0
    square = Buckets((Size(1024, 1024),))
    assert square.fit(Size(832, 1216)).cropped_share == pytest.approx(0.316, abs=0.001)


@pytest.mark.parametrize(
    ("original", "resized", "target"),
    [  # the values of sd-scripts 48d368f for 1024x1024 and steps of 64
        ((500, 700), (500, 700), (448, 640)),
        ((1024, 1024), (1024, 1024), (1024, 1024)),
        ((1920, 1080), (1365, 768), (1344, 768)),
        ((3000, 1000), (1728, 576), (1728, 576)),
        ((30, 100), (64, 213), (64, 64)),  # shorter than a step: enlarged
    ],
)
def test_no_upscale(original: tuple[int, int], resized: tuple[int, int], target: tuple[int, int]) -> None:
    (buckets,) = training_buckets(data_section(bucket={"enabled": True, "no_upscale": True}))
    fit = buckets.fit(Size(*original))
    assert (fit.resized, fit.target) == (Size(*resized), Size(*target))


def test_several_resolutions() -> None:
    data = data_section(resolution_px=[1024, 512, 768])
    assert (data.resolution_px, data.smaller_px) == (1024, (512, 768))
    assert [buckets.fit(Size(50, 50)).target.width for buckets in training_buckets(data)] == [512, 768, 1024]
    assert DataSection.model_validate(data.model_dump()) == data
    for wrong in ([], ["a"], [768, 768]):
        with pytest.raises(ValueError, match="_px`"):
            data_section(resolution_px=wrong)
