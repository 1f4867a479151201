from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from spectune.errors import InputError
from spectune.training.data.cache import shards as module
from spectune.training.data.cache.keys import as_keys, key_of
from spectune.training.data.cache.shards import posterior_bytes
from spectune.training.data.cache.store import LatentStore, StoredLatents
from spectune.training.data.latents import sample_posterior
from tests.training.data.conftest import pictures_in

SHAPE = (4, 3, 2)


def posterior(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, 3, 2, generator=generator)
    return torch.cat([mean, torch.rand(2, 3, 2, generator=generator) + 0.1]).to(torch.bfloat16)


def write(store: LatentStore, *names: str, seed: int = 0) -> None:
    """Write posteriors with successive seeds under names, and load them."""
    with store.writer(SHAPE) as writer:
        for index, name in enumerate(names):
            writer.add(key_of(name), posterior(seed + index))
    store.load()


def read(store: LatentStore, name: str) -> Tensor | None:
    places = store.find(as_keys([key_of(name)]))
    if places.shards[0] < 0:
        return None
    return store.shards[places.shards[0]].read(int(places.rows[0]), int(places.crcs[0]))


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    return LatentStore(tmp_path / "cache", "vae")


def equal(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.equal(found, expected)


def test_written_rows_are_found(store: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 2 * posterior_bytes(SHAPE))
    write(store, "a", "b", "c", "d", "e")
    assert [path.stat().st_size < 4300 for path in store.folder.iterdir()] == [True] * 3  # 2 + 2 + 1 rows
    again = LatentStore(tmp_path / "cache", "vae")
    assert [equal(read(again, name), posterior(i)) for i, name in enumerate("abcde")] == [True] * 5
    assert read(again, "f") is None
    assert LatentStore(tmp_path / "cache", "other").shards == ()
    with safe_open(again.shards[0].path, "pt") as opened:  # by the library of the format
        assert opened.get_slice("posteriors").get_shape() == [2, *SHAPE]
        assert torch.equal(opened.get_tensor("posteriors"), torch.stack([posterior(0), posterior(1)]))
        assert opened.metadata()["spectune.vae_key"] == "vae"


def test_the_oldest_of_two_rows_is_read(store: LatentStore, tmp_path: Path) -> None:
    write(store, "a", "b", seed=0)
    write(LatentStore(tmp_path / "cache", "vae"), "b", "c", seed=10)
    store.load()
    assert len(store.shards) == 2
    assert equal(read(store, "b"), posterior(1))
    assert equal(read(store, "c"), posterior(11))


def test_two_writers_at_once(store: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = LatentStore(tmp_path / "cache", "vae")
    with store.writer(SHAPE) as first:
        first.add(key_of("a"), posterior(0))
        with monkeypatch.context() as patch:
            patch.setattr(module, "partial_path", lambda path: path.with_name(".another process"))
            write(other, "a", "b", seed=0)
        first.add(key_of("c"), posterior(5))
    store.load()
    assert len(store.shards) == 2
    assert store.damaged == set()
    assert [equal(read(store, name), posterior(seed)) for name, seed in (("a", 0), ("b", 1), ("c", 5))]


def test_a_stop_completes_the_shard(store: LatentStore) -> None:
    def stopped() -> None:
        with store.writer(SHAPE) as writer:
            writer.add(key_of("a"), posterior(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    store.load()
    assert equal(read(store, "a"), posterior(0))
    assert len(list(store.folder.iterdir())) == 1  # no temporary file is left


def test_a_full_disk_is_one_error(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, "a")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "rename", full)
    with pytest.raises(InputError, match=r"cannot write to the latent cache .*: No space left on device"):
        write(store, "b")
    assert len(list(store.folder.iterdir())) == 1
    assert equal(read(store, "a"), posterior(0))


@pytest.mark.parametrize("damage", ["empty", "text", "cut short", "other shape", "other autoencoder"])
def test_a_damaged_shard_is_named(store: LatentStore, tmp_path: Path, damage: str) -> None:
    write(store, "a")
    write(store, "b")
    path = store.shards[1].path
    data = path.read_bytes()
    changed = {
        "empty": b"",
        "text": b"no safetensors",
        "cut short": data[:-8],
        "other shape": data.replace(b"[1, 4, 3, 2]", b"[1, 24, 1]  "),
        "other autoencoder": data.replace(b'"vae"', b'"wae"'),
    }
    path.write_bytes(changed[damage])
    again = LatentStore(tmp_path / "cache", "vae")
    assert read(again, "a") is not None
    assert read(again, "b") is None
    assert again.warnings() == [
        f"1 unreadable file in the latent cache, whose pictures are encoded again: delete {path.name}"
    ]


def test_a_damaged_row_is_an_error_and_is_encoded_again(
    store: LatentStore, folder: Path, tmp_path: Path
) -> None:
    write(store, "a", "b")
    pictures = pictures_in(folder)
    stored = StoredLatents(store.shards, store.find(as_keys([key_of("b"), key_of("a")])), seed=3)
    view = pictures.cached_view(0)
    expected = sample_posterior(posterior(1).float(), view, 3)
    assert torch.equal(stored.of(view, 0), expected)
    assert not torch.equal(stored.of(view, 0), expected * 1.01)
    path = store.shards[0].path
    data = bytearray(path.read_bytes())
    data[store.shards[0].posteriors_at + posterior_bytes(SHAPE) + 5] ^= 1  # one bit of row 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"row 1 of the latent cache .*safetensors is damaged") as error:
        stored.of(view, 0)
    assert error.value.hint == "start the run again: it resumes and encodes this picture again"
    again = LatentStore(tmp_path / "cache", "vae")
    assert again.damaged == set()
    assert read(again, "b") is None
    assert equal(read(again, "a"), posterior(0))
    shutil.rmtree(store.folder)
    with pytest.raises(InputError, match="cannot read the latent cache"):
        stored.of(view, 1)


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"the folder of the latent cache cannot be created: .*file"):
        LatentStore(tmp_path / "file" / "cache", "vae")


def test_a_view_takes_12_bytes_of_memory(store: LatentStore) -> None:
    write(store, "a")
    places = store.find(as_keys(key_of(str(number)) for number in range(1000)))
    assert sum(array.nbytes for array in vars(places).values()) == 12 * 1000
    # nothing else of a run's latents grows with the views
    assert set(vars(StoredLatents(store.shards, places, 0))) == {"shards", "places", "seed"}
