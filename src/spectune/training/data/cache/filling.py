"""Fill a cache folder with the posteriors of a run's views: only those that no shard has are encoded."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from spectune.errors import InputError, counted
from spectune.model.network import Sdxl
from spectune.training.callbacks import Callbacks, stage
from spectune.training.data.buckets import Size
from spectune.training.data.cache.contents import ContentHashes, hash_files, stamp_of
from spectune.training.data.cache.keys import KEY_BYTES, Keys, as_keys, key_of
from spectune.training.data.cache.shards import posterior_bytes
from spectune.training.data.cache.store import LatentStore, RowPlaces, StoredLatents
from spectune.training.data.dataset import Pictures
from spectune.training.data.latents import encode_views, posterior_shape
from spectune.training.processes.sharing import on_any_process, on_every_process, shared, writes_files
from spectune.training.saving.disk import free_disk, shown_size

_BLOCK = 4096  # views or images whose Python objects exist at the same time
_HASHED_AT_ONCE = 16  # images
_PAUSES = 60  # of a second, until a network disk shows the files of another host


@dataclass(frozen=True)
class Identities:
    """What identifies the files of a run's images, (files, 16) each."""

    contents: Keys  # hashes
    stamps: Keys  # when they were hashed


def fill_cache(
    model: Sdxl, pictures: Pictures, store: LatentStore, *, seed: int, callbacks: Callbacks
) -> StoredLatents:
    """Encode the views that the store lacks, and return the latents of all views of a run.

    Each view is encoded by one process. One process writes to each folder: that of the main process, and
    those of other hosts that do not see it.

    Raises:
        InputError: The disk is too full, or an image cannot be read or changed meanwhile.
        LatentsNotFiniteError: Latents are not finite.
    """
    identities = identify(pictures, store, callbacks)
    places, missing = _search(pictures, store, identities)
    if len(missing):
        is_writer = _is_writer(store.folder)
        groups = _by_size(pictures, missing)
        rows = {size: posterior_bytes(posterior_shape(model, size)) for size in groups}
        nbytes = sum(len(group) * rows[size] for size, group in groups.items())
        on_every_process(lambda: _check_disk(store.folder, nbytes) if is_writer else None)
        callbacks.on_message(
            f"latents: {len(missing):,} of {counted(len(places.shards), 'view')} are encoded and take "
            f"{shown_size(nbytes)} in {store.folder}"
        )
        with stage(callbacks, "encoding images") as progressed:
            done = 0
            for size, group in groups.items():
                for _ in _written(model, pictures, store, identities, size, group, is_writer):
                    done += 1
                    progressed(done, len(missing))
        on_any_process([])  # wait until all shards are complete
        places = _search_again(pictures, store, identities)
    return StoredLatents(store.shards, places, seed)


def identify(pictures: Pictures, store: LatentStore, callbacks: Callbacks) -> Identities:
    """Return what identifies the images of a run. Files that no run has seen are read, by one process each.

    Raises:
        InputError: A file cannot be read.
    """
    known = ContentHashes(store.folder.parent)
    contents, stamps = np.zeros((2, pictures.files, KEY_BYTES), dtype=np.uint8)
    with stage(callbacks, "identifying images") as progressed:
        try:
            for start in range(0, pictures.files, _BLOCK):
                stop = min(start + _BLOCK, pictures.files)
                paths = [pictures.images[image].path for image in range(start, stop)]
                contents[start:stop], stamps[start:stop] = _identified(paths, known)
                progressed(stop, pictures.files)
        finally:
            known.save()
    store.damaged.update(known.damaged)
    return Identities(contents, stamps)


def _identified(paths: Sequence[Path], known: ContentHashes) -> tuple[Keys, Keys]:
    """Return the hashes and the stamps of files. New hashes are added to `known`."""
    stamped = [stamp_of(path) for path in paths]
    stamps = as_keys(stamp for stamp, _ in stamped)
    hashes, is_known = known.find(stamps)
    unknown = on_any_process(np.flatnonzero(~is_known).tolist())
    parts = [unknown[at : at + _HASHED_AT_ONCE] for at in range(0, len(unknown), _HASHED_AT_ONCE)]
    files = [[paths[index] for index in part] for part in parts]
    for part, hashed in zip(parts, shared(files, hash_files), strict=True):
        hashes[part] = as_keys([hashed])
    settled = [index for index in unknown if stamped[index][1] and not is_known[index]]
    if settled and writes_files():
        known.add(stamps[settled], hashes[settled])
    return hashes, stamps


def _search(
    pictures: Pictures, store: LatentStore, identities: Identities
) -> tuple[RowPlaces, NDArray[np.int64]]:
    """Return the places of all views, and the numbers of those that any process lacks."""
    places = RowPlaces.empty(len(pictures) * pictures.views_per_image)
    missing = [np.empty(0, np.int64)]
    for start, keys in _keys(pictures, identities):
        found = store.find(keys)
        places.put(start, found)
        lacking = on_any_process(np.flatnonzero(found.shards < 0).tolist())
        missing.append(start + np.array(lacking, np.int64))
    return places, np.concatenate(missing)


def _search_again(pictures: Pictures, store: LatentStore, identities: Identities) -> RowPlaces:
    """Return the places of all views after they were written, as soon as all processes see the files."""
    for _ in range(_PAUSES):
        store.load()
        places, missing = _search(pictures, store, identities)
        if not len(missing):
            return places
        time.sleep(1)
    raise InputError(
        f"encoded images are not in {store.folder}, where this run has just written them",
        hint="start the run again, and check whether another program removes files there",
    )


def _keys(pictures: Pictures, identities: Identities) -> Iterator[tuple[int, Keys]]:
    """Yield the keys of the cached views in blocks, each with the number of its first view."""
    per_image = pictures.views_per_image
    images = max(1, _BLOCK // per_image)
    for start in range(0, len(pictures), images):
        stop = min(start + images, len(pictures))
        numbers = np.arange(start * per_image, stop * per_image)
        yield start * per_image, _keys_of(pictures, identities, numbers)


def _keys_of(pictures: Pictures, identities: Identities, numbers: NDArray[np.int64]) -> Keys:
    """Return the keys of views: each is the hash of the image file XOR the hash of the view's name.

    The name says size, crop, orientation and color, see `View.pixels_name`.
    """
    images, offsets = np.divmod(numbers, pictures.views_per_image)
    named, name_of = numbers, np.arange(len(numbers))
    if not pictures.variation.varies_views:  # images of one size have views with the same names
        kinds = pictures.placements.kind_of[images].astype(np.int64) * pictures.views_per_image + offsets
        _, first, name_of = np.unique(kinds, return_index=True, return_inverse=True)
        named = numbers[first]
    names = as_keys(key_of(pictures.view_numbered(number).pixels_name) for number in named.tolist())
    return names[name_of] ^ identities.contents[images % pictures.files]


def _by_size(pictures: Pictures, numbers: NDArray[np.int64]) -> dict[Size, NDArray[np.int64]]:
    """Return the numbers of views by the training size of their images."""
    wanted = np.zeros(len(pictures) * pictures.views_per_image, dtype=np.bool_)
    wanted[numbers] = True
    offsets = np.arange(pictures.views_per_image)
    groups: dict[Size, NDArray[np.int64]] = {}
    for size, images in pictures.placements.by_target().items():
        views = (images[:, None].astype(np.int64) * len(offsets) + offsets).ravel()
        if len(views := views[wanted[views]]):
            groups[size] = views
    return groups


def _written(
    model: Sdxl,
    pictures: Pictures,
    store: LatentStore,
    identities: Identities,
    size: Size,
    numbers: NDArray[np.int64],
    is_writer: bool,
) -> Iterator[None]:
    """Encode views of one size and write them to shards; yield after each."""
    with ExitStack() as stack:
        writer = stack.enter_context(store.writer(posterior_shape(model, size))) if is_writer else None
        for start in range(0, len(numbers), _BLOCK):
            block = numbers[start : start + _BLOCK]
            views = [pictures.view_numbered(number) for number in block.tolist()]
            keys = _keys_of(pictures, identities, block)
            rows = encode_views(model, pictures, views, size, torch.bfloat16)
            for view, key, posterior in zip(views, keys, rows, strict=True):
                if writer is not None:
                    stamp = identities.stamps[view.image % pictures.files]
                    _check_unchanged(pictures.images[view.image].path, stamp)
                    writer.add(key.tobytes(), posterior)
                yield


def _check_unchanged(path: Path, stamp: NDArray[np.uint8]) -> None:
    if stamp_of(path)[0] != stamp.tobytes():
        raise InputError(f"{path} changed while the images were encoded", hint="start the run again")


def _check_disk(folder: Path, nbytes: int) -> None:
    free = free_disk(folder)
    if nbytes > free:
        raise InputError(
            f"the latents need {shown_size(nbytes)} in {folder}, whose disk has {shown_size(free)} free",
            hint="set data.cache_folder to a folder on another disk",
        )


def _is_writer(folder: Path) -> bool:
    """Return whether this process writes to its folder: the main one, and one of each host with another."""
    markers: list[Path] = []

    def mark(name: str) -> str:
        markers.append(folder / name)
        markers[0].touch()
        return name

    (name,) = shared([f"seen-{uuid.uuid4().hex}"], mark)  # on the main process
    sees_it = (folder / name).exists()
    on_any_process([])  # all have looked
    for marker in markers:
        marker.unlink(missing_ok=True)
    return bool(markers) or (writes_files() and not sees_it)
