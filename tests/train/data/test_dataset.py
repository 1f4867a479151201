from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from spectune.train.data.buckets import Size, bucket_sizes
from spectune.train.data.captions import CaptionRules
from spectune.train.data.dataset import Batch, Pictures, Variation, as_it_is
from spectune.train.data.folders import scan_parents
from spectune.train.data.plan import BatchPlan, PlannedBatches
from tests.train.conftest import draw

VARIATION = Variation(
    CaptionRules(shuffle=True, dropout_probability=0.3), flip_probability=0.5, random_crop=True
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    parent = tmp_path_factory.mktemp("mixed")
    for index, size in enumerate([(40, 40), (100, 40), (40, 100), (41, 40)]):
        path = parent / "2_x" / f"{index}.png"
        draw(path, size, seed=index)
        path.with_suffix(".txt").write_text(f"{index}, a, b, c")
    sizes = bucket_sizes(32, minimum=16, maximum=64, step=16)
    return Pictures(scan_parents([parent], [".txt"]).images, sizes, VARIATION, seed=3)


def batches(pictures: Pictures, workers: int = 0) -> list[Batch]:
    plan = BatchPlan(pictures.buckets(), batch=2, seed=3)
    loader = DataLoader(
        pictures,  # pyright: ignore
        batch_sampler=PlannedBatches(plan, 0, 2 * plan.batches_per_epoch),
        collate_fn=as_it_is,  # pyright: ignore
        num_workers=workers,
    )
    return list(loader)


def test_batches_do_not_depend_on_workers_or_what_came_before(pictures: Pictures) -> None:
    first = batches(pictures)
    torch.manual_seed(99)
    second = batches(pictures, workers=2)
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert (one.captions, one.position) == (two.captions, two.position)
        assert torch.equal(one.time_ids, two.time_ids)
        assert one.pixels is not None
        assert two.pixels is not None
        assert torch.equal(one.pixels, two.pixels)


def test_epochs_vary(pictures: Pictures) -> None:
    half = len(batches(pictures)) // 2
    first, second = batches(pictures)[:half], batches(pictures)[half:]
    assert sorted(c for batch in first for c in batch.captions) != sorted(
        c for b in second for c in b.captions
    )


def test_shapes_and_time_ids(pictures: Pictures) -> None:
    for batch in batches(pictures):
        assert batch.pixels is not None
        assert batch.time_ids.dtype == torch.float32
        for ids in batch.time_ids.tolist():
            assert ids[4:] == list(batch.pixels.shape[2:])
            assert ids[:2] in ([40, 40], [40, 100], [100, 40], [40, 41])


def test_buckets_follow_the_aspect(pictures: Pictures) -> None:
    assert pictures.targets[0] == pictures.targets[3] == Size(32, 32)
    assert pictures.targets[1].width > pictures.targets[1].height
    assert pictures.targets[2].width < pictures.targets[2].height


def test_cached_latents_stand_in_for_pixels(pictures: Pictures, tmp_path: Path) -> None:
    cached = Pictures(pictures.images, [Size(32, 32)], Variation(flip_probability=0.5), seed=3)
    cached.latents = {
        (i, flip): torch.full((4, 8, 8), 10.0 * i + flip) for i in range(4) for flip in (False, True)
    }
    seen = set()
    for batch in batches(cached):
        assert batch.pixels is None
        assert batch.latents is not None
        seen |= set(batch.latents[:, 0, 0, 0].tolist())
    assert len(seen) > 4  # both orientations are drawn


def test_which_orientations_a_cache_needs() -> None:
    assert Variation().flips == (False,)
    assert Variation(flip_probability=0.5).flips == (False, True)
    assert Variation(flip_probability=1.0).flips == (True,)
