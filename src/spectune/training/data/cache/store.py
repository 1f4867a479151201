"""The shards of one autoencoder in a cache folder, and the latents of a run that are read from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spectune.errors import InputError, counted, some_of
from spectune.files.provenance import PREFIX
from spectune.training.data.cache.keys import Keys, RowsByKey, as_keys
from spectune.training.data.cache.shards import NO_KEY, Shard, ShardRows, ShardWriter, open_shard
from spectune.training.data.dataset import View
from spectune.training.data.latents import sample_posterior

_FORMAT = "3"  # raise it when a change affects the pixels of a view or the shards


@dataclass(frozen=True)
class RowPlaces:
    """Where the posteriors of views are: 12 bytes for each view."""

    shards: NDArray[np.int32]  # (views,), the number of the shard, -1 for views without one
    rows: NDArray[np.uint32]  # (views,), in the shard
    crcs: NDArray[np.uint32]  # (views,), of the posterior

    @classmethod
    def empty(cls, views: int) -> RowPlaces:
        """Return places for a number of views, none of which has a posterior."""
        return cls(np.full(views, -1, np.int32), np.zeros(views, np.uint32), np.zeros(views, np.uint32))

    def put(self, start: int, others: RowPlaces) -> None:
        """Copy the places of some views to those from `start` on."""
        for mine, theirs in zip(
            (self.shards, self.rows, self.crcs), (others.shards, others.rows, others.crcs), strict=True
        ):
            mine[start : start + len(theirs)] = theirs


@dataclass(frozen=True)
class StoredLatents:
    """The latents of a run on disk. A draw reads the posterior of its view and takes a sample."""

    shards: tuple[Shard, ...]
    places: RowPlaces  # of the cached views of the run, by their numbers
    seed: int
    in_memory = False

    def of(self, view: View, number: int) -> Tensor:
        """Return the latents of a view, (channels, h, w) float32: always the same sample.

        Raises:
            InputError: The shard cannot be read or is damaged.
        """
        shard, row = self.shards[self.places.shards[number]], int(self.places.rows[number])
        try:
            posterior = shard.read(row, int(self.places.crcs[number]))
        except OSError as error:
            raise InputError(
                f"cannot read the latent cache {shard.path}: {error.strerror}",
                hint="start the run again: it resumes, and encodes the pictures of missing files again",
            ) from error
        if posterior is None:
            raise self._damaged(shard, row)
        return sample_posterior(posterior.float(), view, self.seed)

    def _damaged(self, shard: Shard, row: int) -> InputError:
        hint = "start the run again: it resumes and encodes this picture again"
        try:
            shard.forget(row)
        except OSError:
            hint = "delete this file and start the run again: it resumes and encodes the pictures again"
        return InputError(f"row {row} of the latent cache {shard.path} is damaged", hint=hint)


class LatentStore:
    """A folder of shards with the posteriors of one autoencoder.

    Several processes and runs may use a folder at the same time: a shard appears complete and never changes,
    except that a damaged row loses its key. Of several posteriors of a view, the oldest is used.
    """

    def __init__(self, folder: Path, vae_key: str) -> None:
        """Open the shards of an autoencoder. `vae_key` identifies its weights, scale, shift and padding.

        Raises:
            InputError: The folder cannot be created.
        """
        self.folder = folder / vae_key[:16]
        self.damaged: set[Path] = set()
        self.shards: tuple[Shard, ...] = ()
        self._metadata = {PREFIX + "format": _FORMAT, PREFIX + "vae_key": vae_key}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the folder of the latent cache cannot be created: {folder}: {error.strerror}",
                hint="set data.cache_folder to another folder",
            ) from error
        self.load()

    def load(self) -> None:
        """Read the keys of all shards. A shard that cannot be read is listed in `damaged`."""
        found: list[tuple[Shard, ShardRows]] = []
        for path in sorted(self.folder.glob("[0-9a-f]*.safetensors")):
            try:
                found.append(open_shard(path, self._metadata))
            except InputError:
                self.damaged.add(path)
        self.shards = tuple(shard for shard, _ in found)
        rows = [rows for _, rows in found]
        counts = [len(one.keys) for one in rows]
        keys = np.concatenate([as_keys([]), *(one.keys for one in rows)])
        present = np.flatnonzero((keys != np.frombuffer(NO_KEY, np.uint8)).any(axis=1))
        self._table = RowsByKey(keys[present])
        self._places = RowPlaces(
            np.repeat(np.arange(len(counts), dtype=np.int32), counts)[present],
            np.concatenate([np.arange(count, dtype=np.uint32) for count in [0, *counts]])[present],
            np.concatenate([np.empty(0, np.uint32), *(one.crcs for one in rows)])[present],
        )

    def find(self, keys: Keys) -> RowPlaces:
        """Return the places of views by their keys, (views, 16)."""
        rows = self._table.find(keys)
        places, found = RowPlaces.empty(len(keys)), rows >= 0
        places.shards[found] = self._places.shards[rows[found]]
        places.rows[found] = self._places.rows[rows[found]]
        places.crcs[found] = self._places.crcs[rows[found]]
        return places

    def writer(self, shape: tuple[int, int, int]) -> ShardWriter:
        """Return a writer of posteriors with a shape."""
        return ShardWriter(self.folder, shape, self._metadata)

    def warnings(self) -> list[str]:
        """Return a line about damaged shards, if there are any."""
        if not self.damaged:
            return []
        names = some_of(sorted(file.name for file in self.damaged))
        return [
            f"{counted(len(self.damaged), 'unreadable file')} in the latent cache, whose pictures are "
            f"encoded again: delete {names}"
        ]
