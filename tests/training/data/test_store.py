from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectune.errors import InputError
from spectune.training.data.store import LatentStore

SHAPE = (4, 3, 2)


def posterior(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, 3, 2, generator=generator)
    return torch.cat([mean, torch.rand(2, 3, 2, generator=generator) + 0.1])


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    path.write_bytes(b"any bytes")
    return path


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    return LatentStore(tmp_path / "cache", "vae")


def test_added_views_are_loaded(store: LatentStore, picture: Path, tmp_path: Path) -> None:
    file = store.file_of(picture)
    assert store.load(file, ["a"], SHAPE) == {}
    store.add(file, {"a": posterior(0)})
    store.add(file, {"b": posterior(1)})

    again = LatentStore(tmp_path / "cache", "vae")
    loaded = again.load(again.file_of(picture), ["a", "b", "c"], SHAPE)
    assert sorted(loaded) == ["a", "b"]
    assert torch.equal(loaded["a"], posterior(0))
    assert torch.equal(loaded["b"], posterior(1))
    assert again.damaged == set()
    assert again.warnings() == []
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["spectune.vae_key"] == "vae"
    assert list(file.parent.iterdir()) == [file]  # no temporary file is left


def test_a_file_is_found_by_contents_and_autoencoder(
    store: LatentStore, picture: Path, tmp_path: Path
) -> None:
    file = store.file_of(picture)
    copy = tmp_path / "other name.webp"
    copy.write_bytes(picture.read_bytes())
    assert store.file_of(copy) == file
    assert LatentStore(tmp_path / "cache", "other").file_of(picture) != file
    picture.write_bytes(b"other bytes")
    assert store.file_of(picture) != file


@pytest.mark.parametrize(
    "broken",
    [
        posterior()[:, :2],
        posterior().double(),
        posterior().index_fill(0, torch.tensor([1]), float("nan")),
        posterior().index_fill(0, torch.tensor([3]), float("inf")),
        posterior().index_fill(0, torch.tensor([2]), 0.0),
        posterior().neg(),
    ],
    ids=["shape", "dtype", "nan", "infinite deviation", "no deviation", "negative deviation"],
)
def test_invalid_views_are_skipped_and_counted(store: LatentStore, picture: Path, broken: Tensor) -> None:
    file = store.file_of(picture)
    file.parent.mkdir()
    save_file({"good": posterior(1), "bad": broken.contiguous()}, file)

    assert store.load(file, ["good"], SHAPE).keys() == {"good"}
    assert store.damaged == set()
    assert store.load(file, ["good", "bad"], SHAPE).keys() == {"good"}
    assert store.damaged == {file}
    assert store.warnings() == [f"1 damaged file in the latent cache, encoded again: {file.name}"]
    store.add(file, {"bad": posterior(2)})
    loaded = store.load(file, ["good", "bad"], SHAPE)
    assert torch.equal(loaded["bad"], posterior(2))
    assert torch.equal(loaded["good"], posterior(1))


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None], ids=["empty", "text", "cut short"])
def test_files_that_cannot_be_read_are_replaced(
    store: LatentStore, picture: Path, damage: bytes | None
) -> None:
    file = store.file_of(picture)
    store.add(file, {"a": posterior()})
    file.write_bytes(file.read_bytes()[:-8] if damage is None else damage)

    assert store.load(file, ["a"], SHAPE) == {}
    assert store.damaged == {file}
    store.add(file, {"a": posterior(3)})
    assert torch.equal(store.load(file, ["a"], SHAPE)["a"], posterior(3))


def test_a_folder_that_cannot_be_created(picture: Path) -> None:
    with pytest.raises(InputError, match=r"data\.cache_folder cannot be created: .*cat\.png"):
        LatentStore(picture / "cache", "vae")


def test_an_autoencoder_without_deviations_is_cached(tmp_path: Path, picture: Path) -> None:
    exact = LatentStore(tmp_path / "cache", "vae", has_deviations=False)
    without = posterior().index_fill(0, torch.tensor([2, 3]), 0.0)
    file = exact.file_of(picture)
    exact.add(file, {"good": without, "bad": posterior()})
    assert exact.load(file, ["good"], SHAPE).keys() == {"good"}
    assert exact.damaged == set()
    assert exact.load(file, ["good", "bad"], SHAPE).keys() == {"good"}
    assert exact.damaged == {file}
