"""Near duplicates by perceptual hashes, against a comparison of all pairs."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from spectune.ops.dataset import near_duplicates
from spectune.ops.dataset.near_duplicates import NEAR_BITS, near_groups, perceptual_hash

DEMO = Path(__file__).resolve().parents[3] / "demo" / "images" / "10_emoji3d"


def groups_by_pairs(hashes: list[int]) -> list[list[int]]:
    """Return the groups by comparing every pair."""
    groups = [{index} for index in range(len(hashes))]
    for first in range(len(hashes)):
        for second in range(first):
            if (hashes[first] ^ hashes[second]).bit_count() <= NEAR_BITS:
                joined = groups[first] | groups[second]
                for index in joined:
                    groups[index] = joined
    return sorted({tuple(sorted(group)) for group in groups if len(group) > 1}, key=lambda group: group[0])  # pyright: ignore


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_groups_are_those_of_all_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_BLOCK", block)
    random = Random(0)
    hashes = [random.getrandbits(64) for _ in range(60)]
    for _ in range(40):  # chains: the ends of a group may be far from each other
        bits = sum(1 << bit for bit in random.sample(range(64), random.randint(0, NEAR_BITS + 2)))
        hashes.append(random.choice(hashes) ^ bits)
    expected = groups_by_pairs(hashes)
    assert len(expected) > 5
    assert [tuple(group) for group in near_groups(hashes)] == expected


def test_one_bit_more_than_the_limit_is_no_duplicate() -> None:
    near, far = (1 << NEAR_BITS) - 1, (1 << NEAR_BITS + 1) - 1
    assert near_groups([0, near]) == [[0, 1]]
    assert near_groups([0, far]) == []
    assert near_groups([]) == []


def test_many_identical_hashes_are_one_group() -> None:
    assert near_groups([7] * 5000 + [2**64 - 8]) == [list(range(5000))]


def test_scaling_and_noise_hardly_change_the_hash() -> None:
    pytest.importorskip("imagehash")
    with Image.open(DEMO / "alarm_clock.webp") as opened:
        gray = opened.convert("RGB").convert("L")
    levels = np.asarray(gray, dtype=np.int16) + np.random.default_rng(0).integers(-4, 5, gray.size[::-1])
    noisy = Image.fromarray(levels.clip(0, 255).astype(np.uint8)).resize((96, 96))
    first, second, mirrored = (
        perceptual_hash(image) for image in (gray, noisy, gray.transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    )
    assert first is not None
    assert second is not None
    assert mirrored is not None
    assert (first ^ second).bit_count() <= NEAR_BITS < (first ^ mirrored).bit_count()
