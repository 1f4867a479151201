from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader

from spectune.training.data import dataset
from spectune.training.data.buckets import Buckets, Size, bucket_sizes
from spectune.training.data.dataset import Batch, Pictures, Variation, keep_batch
from spectune.training.data.folders import scan_training
from spectune.training.data.images import open_image, render
from spectune.training.data.latents import LatentsInMemory
from spectune.training.data.plan import BatchPlan, PlannedBatches
from spectune.training.recipe.sections.data import CaptionSection, DataSection, ImageSetSection, MaskSource
from tests.training.conftest import draw

SQUARE = Buckets((Size(32, 32),))
VARIATION = Variation(
    CaptionSection(shuffle=True, dropout_probability=0.3), flip_probability=0.5, random_crop=True
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    parent = tmp_path_factory.mktemp("mixed")
    for index, size in enumerate([(40, 40), (100, 40), (40, 100), (41, 40)]):
        path = parent / "2_x" / f"{index}.png"
        draw(path, size, seed=index)
        path.with_suffix(".txt").write_text(f"{index}, a, b, c")
    sizes = bucket_sizes(32, minimum=16, maximum=64, step=16)
    return Pictures(scan_training(DataSection(folders=(parent,))).images, [Buckets(sizes)], VARIATION, seed=3)


def batches(pictures: Pictures, workers: int = 0) -> list[Batch]:
    plan = BatchPlan(pictures.buckets(), batch=2, seed=3)
    loader = DataLoader(
        pictures,  # pyright: ignore
        batch_sampler=PlannedBatches(plan, 0, 2 * plan.batches_per_epoch),
        collate_fn=keep_batch,  # pyright: ignore
        num_workers=workers,
    )
    return list(loader)


def test_batches_do_not_depend_on_workers_or_earlier_batches(pictures: Pictures) -> None:
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


def test_a_seed_always_gives_the_same_draws(pictures: Pictures) -> None:
    """Pin captions and crops, because a run must be able to resume after an update of spectune."""
    draws = [(batch.captions, batch.time_ids[:, 2:4].int().tolist()) for batch in batches(pictures)[:4]]
    assert draws == [
        (("c, 2, a, b", ""), [[0, 2], [0, 0]]),
        (("", "c, b, a, 1"), [[1, 0], [3, 0]]),
        (("b, a, c, 3", "a, 3, c, b"), [[0, 0], [0, 1]]),
        (("a, c, 0, b", "c, 0, b, a"), [[0, 0], [0, 0]]),
    ]


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
    targets = [placement.target for placement in pictures.placements]
    assert targets[0] == targets[3] == Size(32, 32)
    assert targets[1].width > targets[1].height
    assert targets[2].width < targets[2].height


def test_cached_latents_replace_pixels(pictures: Pictures, tmp_path: Path) -> None:
    cached = Pictures(pictures.images, [SQUARE], Variation(flip_probability=0.5), seed=3)
    cached.latents = LatentsInMemory({number: torch.full((4, 8, 8), 10.0 * number) for number in range(8)})
    seen = set()
    for batch in batches(cached):
        assert batch.pixels is None
        assert batch.latents is not None
        seen |= set(batch.latents[:, 0, 0, 0].tolist())
    assert len(seen) > 4  # both orientations are drawn


def test_views_have_numbers(pictures: Pictures) -> None:
    several = Variation(flip_probability=0.5, random_crop=True, cached_variants=3)
    for variation, count in ((Variation(), 4), (Variation(flip_probability=1.0), 4), (several, 24)):
        cached = Pictures(pictures.images, [SQUARE], variation, seed=3)
        views = [cached.view_numbered(number) for number in range(count)]
        assert len(set(views)) == count == len(cached) * cached.views_per_image
        assert [cached.number_of(view) for view in views] == list(range(count))
        assert [view.image for view in views] == sorted(view.image for view in views)


def test_orientations_that_are_cached() -> None:
    assert Variation().flips == (False,)
    assert Variation(flip_probability=0.5).flips == (False, True)
    assert Variation(flip_probability=1.0).flips == (True,)


ALL = Variation(
    CaptionSection(shuffle=True, keep_tokens=1, dropout_probability=0.1, tag_dropout_probability=0.3),
    flip_probability=0.5,
    random_crop=True,
    color_probability=0.5,
)


@pytest.fixture(scope="module")
def masked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 40x32 pixels whose alpha channel equals their mask file; one image has neither."""
    folder = tmp_path_factory.mktemp("masked")
    rows, columns = np.mgrid[:32, :40]
    for index in range(4):
        gray = Image.fromarray((rows * 2 + columns * 4 + index).astype(np.uint8))
        picture = Image.merge("RGBA", [gray] * 4) if index else gray
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"{index}, a, b, c")
        if index:
            gray.save(folder / f"{index}.mask.png")
    return folder


def masked_pictures(
    folder: Path, masks: MaskSource, variation: Variation = ALL, *, weight: float = 1.0
) -> Pictures:
    image_set = ImageSetSection(path=folder, repeats=2, loss_weight=weight)
    images = scan_training(DataSection(sets=(image_set,), mask=masks)).images
    return Pictures(images, [SQUARE], variation, seed=7, masks=masks, pixels_per_latent=4)


@pytest.mark.parametrize("masks", ["alpha", "file"])
def test_colors_and_masks_do_not_depend_on_workers(masked_folder: Path, masks: MaskSource) -> None:
    pictures = masked_pictures(masked_folder, masks)
    one, two = batches(pictures), batches(pictures, workers=2)
    assert len(one) == len(two) == 8
    assert {view.color is None for batch in one for view in batch.views} == {True, False}
    for first, second in zip(one, two, strict=True):
        assert (first.captions, first.views) == (second.captions, second.views)
        for name in ("pixels", "masks", "time_ids", "weights"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("masks", ["alpha", "file"])
def test_masks_are_cropped_and_mirrored_but_not_recolored(masked_folder: Path, masks: MaskSource) -> None:
    without_color = Variation(ALL.captions, flip_probability=0.5, random_crop=True)
    plain = batches(masked_pictures(masked_folder, "file", without_color))
    colored = batches(masked_pictures(masked_folder, masks))
    places = set()
    for first, second in zip(plain, colored, strict=True):
        assert first.pixels is not None
        assert second.masks is not None
        for mask, view in zip(second.masks, first.views, strict=True):
            gray = masked_folder / f"{view.image}.mask.png"
            levels = (
                (render(open_image(gray), view.placement)[:1] + 1) / 2
                if view.image
                else torch.ones(1, 32, 32)
            )
            torch.testing.assert_close(mask, avg_pool2d(levels, 4), rtol=0, atol=1e-6)
        assert torch.equal(first.time_ids, second.time_ids)
        places |= {(view.placement.left, view.placement.flipped) for view in first.views}
    assert len(places) > 4
    assert any(
        not torch.equal(first.pixels, second.pixels)  # pyright: ignore
        for first, second in zip(plain, colored, strict=True)
    )


def test_no_masks_and_weights(masked_folder: Path) -> None:
    for batch in batches(masked_pictures(masked_folder, "none", weight=0.25)):
        assert batch.masks is None
        assert batch.weights.dtype == torch.float32
        assert batch.weights.tolist() == [0.25] * len(batch)


def test_moving_a_batch_moves_all_of_its_tensors(masked_folder: Path) -> None:
    moved = batches(masked_pictures(masked_folder, "file"))[0].to(torch.device("meta"))
    assert moved.masks is not None
    assert moved.pixels is not None
    tensors = (moved.masks, moved.pixels, moved.weights, moved.time_ids)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.latents is None


def test_a_draw_picks_one_of_the_cached_variants(
    masked_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = Variation(flip_probability=0.5, random_crop=True, color_probability=0.5, cached_variants=3)
    cached = masked_pictures(masked_folder, "alpha", several)
    # the channels of each view encode its image, orientation and variant
    cached.latents = LatentsInMemory(
        {
            image * 6 + flip * 3 + variant: torch.full((2, 1, 1), variant + 10.0 * image + 100 * flip)
            for image in range(4)
            for flip in (False, True)
            for variant in range(3)
        }
    )
    opened: list[Path] = []
    load = dataset.load_image
    monkeypatch.setattr(dataset, "load_image", lambda path: opened.append(path) or load(path))

    seen = set()
    for batch in (batch for _ in range(3) for batch in batches(cached)):
        assert batch.latents is not None
        assert batch.masks is not None
        assert batch.latents.shape[1] == 2
        for row, mask, ids, view in zip(
            batch.latents, batch.masks, batch.time_ids.tolist(), batch.views, strict=True
        ):
            flipped = view.placement.flipped
            assert row.unique().item() == view.variant + 10 * view.image + 100 * flipped
            assert view == cached.cached_view(view.image, flipped=flipped, variant=view.variant)
            assert tuple(ids) == view.placement.time_ids
            assert torch.equal(mask, cached.mask(view))
            seen.add(view)
        opened.clear()
    assert {view.variant for view in seen} == {0, 1, 2}
    list(batches(cached))
    assert opened == []  # masks are cached


def test_cached_views_do_not_depend_on_other_images(masked_folder: Path) -> None:
    several = Variation(flip_probability=0.5, random_crop=True, color_probability=1.0, cached_variants=4)
    every = masked_pictures(masked_folder, "none", several)
    alone = Pictures(every.images[2:], [SQUARE], several, seed=7)
    names = [
        every.cached_view(2, flipped=flip, variant=variant).pixels_name
        for flip in (False, True)
        for variant in range(4)
    ]
    assert len(set(names)) == 8
    assert names[:4] == [alone.cached_view(0, variant=variant).pixels_name for variant in range(4)]
    other = Pictures(every.images, [SQUARE], several, seed=8)
    assert other.cached_view(2).pixels_name != names[0]
    fixed = Pictures(every.images, [SQUARE], Variation(), seed=8)
    assert fixed.cached_view(2, flipped=True).pixels_name == "40x32+4+0-32x32-mirrored"
