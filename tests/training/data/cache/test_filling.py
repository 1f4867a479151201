from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectune.errors import InputError
from spectune.model.network import Sdxl
from spectune.training.callbacks import Callbacks
from spectune.training.data.cache import contents, filling, shards
from spectune.training.data.cache.filling import fill_cache
from spectune.training.data.cache.store import LatentStore, StoredLatents
from spectune.training.data.dataset import Variation
from spectune.training.data.latents import encode_pictures, encode_posteriors, sample_posterior
from tests.training.conftest import draw
from tests.training.data.conftest import FLIPS, VARIED, pictures_in

FIXED = Variation()
Filled = tuple[StoredLatents, dict[int, Tensor]]


def old(folder: Path) -> None:
    """Set the times of all files to the past: a file that was changed just now is always read."""
    for path in folder.rglob("*.png"):
        os.utime(path, (1e9, 1e9))


def fill(
    model: Sdxl, folder: Path, cache: Path, variation: Variation = FIXED, *, key: str = "v", seed: int = 3
) -> dict[int, Tensor]:
    """Fill a cache and return the latents of all views by their numbers."""
    pictures, store = pictures_in(folder, variation, seed=seed), LatentStore(cache, key)
    stored = fill_cache(model, pictures, store, seed=seed, callbacks=Callbacks())
    assert store.warnings() == []
    count = len(pictures) * pictures.views_per_image
    return {number: stored.of(pictures.view_numbered(number), number) for number in range(count)}


def same(one: dict[int, Tensor], two: dict[int, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("variation", [FLIPS, VARIED], ids=["fixed", "varied"])
def test_a_second_run_encodes_nothing(
    model: Sdxl, folder: Path, tmp_path: Path, encoded: list[int], variation: Variation
) -> None:
    first = fill(model, folder, tmp_path / "cache", variation)
    assert sum(encoded) == 5 * 2 * variation.cached_variants == len(first)
    second = fill(model, folder, tmp_path / "cache", variation)
    assert sum(encoded) == len(first)
    assert same(first, second)


@pytest.mark.parametrize("variation", [FLIPS, VARIED], ids=["fixed", "varied"])
def test_latents_are_samples_of_the_rounded_posteriors(
    model: Sdxl, folder: Path, tmp_path: Path, variation: Variation
) -> None:
    pictures = pictures_in(folder, variation)
    latents = fill(model, folder, tmp_path / "cache", variation)
    exact = encode_pictures(model, pictures, seed=3)
    for number in list(latents)[:: variation.cached_variants]:
        view = pictures.view_numbered(number)
        with torch.no_grad():
            posterior = encode_posteriors(model, pictures.pixels(view)[None])[0]
        rounded = posterior.to(torch.bfloat16).float()
        torch.testing.assert_close(latents[number], sample_posterior(rounded, view, 3), rtol=2**-8, atol=1e-5)
        error = (latents[number] - exact.of(view, number)).norm() / exact.of(view, number).norm()
        assert 1e-5 < error < 2**-8  # bfloat16 rounds each number by at most 2^-9 of itself


def test_a_cache_can_be_used_with_other_seeds(
    model: Sdxl, folder: Path, tmp_path: Path, encoded: list[int]
) -> None:
    one, two = (fill(model, folder, tmp_path / "cache", seed=seed) for seed in (3, 4))
    assert sum(encoded) == 5
    assert not torch.equal(one[0], two[0])


def test_files_are_read_again_only_if_they_change(
    model: Sdxl, folder: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    hash_files = contents.hash_files

    def recorded(paths: Any) -> bytes:
        read.extend(path.name for path in paths)
        return hash_files(paths)

    monkeypatch.setattr(filling, "hash_files", recorded)

    def run() -> tuple[list[str], int, dict[int, Tensor]]:
        read.clear()
        encoded.clear()
        latents = fill(model, folder, tmp_path / "cache")
        return sorted(read), sum(encoded), latents

    everything = [f"{index}.png" for index in range(5)]
    assert run()[:2] == (everything, 5)
    assert run()[:2] == (everything, 0)  # they were changed just now
    old(folder)
    assert run()[:2] == (everything, 0)
    _, _, before = run()
    assert read == []
    os.utime(folder / "1_x" / "3.png", (2e9, 1e9 + 1))
    assert run()[:2] == (["3.png"], 0)  # another time, the same bytes
    shutil.move(folder / "1_x" / "2.png", tmp_path / "kept.png")
    draw(folder / "1_x" / "2.png", (40, 44), seed=99)
    os.utime(folder / "1_x" / "2.png", (1e9, 1e9 + 2))
    names, count, after = run()
    assert (names, count) == (["2.png"], 1)
    assert {key for key in before if not torch.equal(before[key], after[key])} == {2}
    shutil.move(tmp_path / "kept.png", folder / "1_x" / "2.png")
    names, count, back = run()
    assert (names, count) == ([], 0)
    assert same(back, before)


def test_copies_of_an_image_share_a_row(
    model: Sdxl, folder: Path, tmp_path: Path, encoded: list[int]
) -> None:
    fill(model, folder, tmp_path / "cache")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "1_x" / "0.png").rename(tmp_path / "copy" / "1_x" / "z.png")
    fill(model, tmp_path / "copy", tmp_path / "cache")
    assert sum(encoded) == 5


def test_an_interrupted_encoding_continues(
    model: Sdxl, folder: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)  # one row
    monkeypatch.setattr("spectune.training.data.latents.ENCODE_BATCH", 1)
    add, added = shards.ShardWriter.add, list[bytes]()

    def interrupted(writer: shards.ShardWriter, key: bytes, posterior: Tensor) -> None:
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(key)
        add(writer, key, posterior)

    monkeypatch.setattr(shards.ShardWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(model, folder, tmp_path / "cache")
    monkeypatch.setattr(shards.ShardWriter, "add", add)
    encoded.clear()
    continued = fill(model, folder, tmp_path / "cache")
    assert sum(encoded) == 2
    assert same(continued, fill(model, folder, tmp_path / "other"))


def test_a_damaged_shard_is_encoded_again(
    model: Sdxl, folder: Path, tmp_path: Path, encoded: list[int]
) -> None:
    before = fill(model, folder, tmp_path / "cache")
    shard = LatentStore(tmp_path / "cache", "v").shards[0].path
    shard.write_bytes(shard.read_bytes()[:-4])
    encoded.clear()
    store = LatentStore(tmp_path / "cache", "v")
    fill_cache(model, pictures_in(folder, FIXED), store, seed=3, callbacks=Callbacks())
    assert store.damaged == {shard}
    assert sum(encoded) in (2, 3)  # the images of one size
    shard.unlink()
    after = fill(model, folder, tmp_path / "cache")
    assert all(torch.allclose(after[key], before[key], rtol=1e-2, atol=1e-5) for key in before)


def test_two_runs_fill_one_folder_at_the_same_time(model: Sdxl, folder: Path, tmp_path: Path) -> None:
    alone = fill(model, folder, tmp_path / "alone")
    results: list[dict[int, Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        # as in two processes
        patch.setattr(shards, "partial_path", lambda path: path.with_name(f".{threading.get_ident()}"))
        threads = [
            threading.Thread(target=lambda: results.append(fill(model, folder, tmp_path / "cache")))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 2
    assert all(same(result, alone) for result in results)
    assert same(fill(model, folder, tmp_path / "cache"), alone)


def test_a_disk_that_is_too_small_is_refused(
    model: Sdxl, folder: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "free_disk", lambda folder: 600)
    with pytest.raises(InputError, match=r"the latents need 0\.0 MB in .*, whose disk has 0\.0 MB free"):
        fill(model, folder, tmp_path / "cache")
    assert encoded == []


def test_an_image_that_changes_meanwhile_is_an_error(
    model: Sdxl, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_views = filling.encode_views

    def changing(*arguments: Any) -> Any:
        draw(folder / "1_x" / "2.png", (40, 44), seed=99)
        return encode_views(*arguments)

    monkeypatch.setattr(filling, "encode_views", changing)
    with pytest.raises(InputError, match=r"2\.png changed while the images were encoded"):
        fill(model, folder, tmp_path / "cache")
