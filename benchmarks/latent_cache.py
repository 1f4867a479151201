"""Measure the cache of latents on disk: writing, random reading, the start of a run, and its main memory.

    python dev.py bench latent_cache                   4,000 posteriors of 1024 px (1 GB), 20,000 pictures
    python dev.py bench latent_cache --views 40000 --pictures 200000 --folder DISK

The posteriors are random numbers, so no network runs. Reading is measured with the pages of the files in the
system's cache, and after the system was asked to drop them (not on Windows and macOS). The pictures are hard
links to a few files, each of which gets a row in the cache before.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from spectune.training.callbacks import Callbacks
from spectune.training.data.buckets import Buckets, Size
from spectune.training.data.cache import filling
from spectune.training.data.cache.keys import as_keys, key_of
from spectune.training.data.cache.store import LatentStore, StoredLatents
from spectune.training.data.dataset import Pictures, Variation
from spectune.training.data.scan import CaptionedImage

SHAPE = (8, 128, 128)  # mean and deviation of SDXL's latents at 1024 px
MOST_LINKS = 50_000  # to one file; ext4 allows 65,000


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def pictures_in(folder: Path, count: int) -> Pictures:
    """Make a folder of hard links, and the pictures of a run at 1024 px."""
    images: list[CaptionedImage] = []
    original = folder
    for number in range(count):
        path = folder / f"{number:07d}.png"
        if number % MOST_LINKS == 0:
            original = path
            color = (number // MOST_LINKS, 0, 0)
            Image.new("RGB", (1024, 1024), color).save(path)
            os.utime(path, (1e9, 1e9))
        else:
            path.hardlink_to(original)
        images.append(CaptionedImage(path, caption="", size=Size(1024, 1024)))
    return Pictures(images, [Buckets((Size(1024, 1024),))], Variation(), seed=0)


def write(store: LatentStore, keys: list[bytes]) -> float:
    """Write random posteriors and return the seconds."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(SHAPE, generator=generator).to(torch.bfloat16) for _ in range(16)]
    started = time.perf_counter()
    with store.writer(SHAPE) as writer:
        for number, key in enumerate(keys):
            writer.add(key, rows[number % len(rows)])
    return time.perf_counter() - started


def forget_pages(store: LatentStore) -> bool:
    """Ask the system to drop the pages of the shards; return whether it can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.sync()
    for shard in store.shards:
        with shard.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def reads_per_second(stored: StoredLatents, pictures: Pictures, views: int, count: int) -> float:
    """Read and sample random posteriors."""
    order, view = random.Random(0).choices(range(views), k=count), pictures.cached_view(0)
    return count / timed(lambda: [stored.of(view, number) for number in order])


def memory() -> int:
    return psutil.Process().memory_info().rss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--views", type=int, default=4000, help="posteriors in the shards")
    parser.add_argument("--reads", type=int, default=2000, help="of random posteriors")
    parser.add_argument("--pictures", type=int, default=20_000, help="of a run that starts")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        measure_reading(folder, options.views, options.reads)
        measure_start(folder, options.pictures)


def measure_reading(folder: Path, views: int, reads: int) -> None:
    (folder / "one").mkdir()
    pictures, store = pictures_in(folder / "one", 1), LatentStore(folder / "cache", "benchmark")
    keys = [key_of(str(number)) for number in range(views)]
    print(f"written per second: {views / write(store, keys):,.0f}")
    opening = timed(store.load)
    stored = StoredLatents(store.shards, store.find(as_keys(keys)), seed=0)
    print(f"keys of {views:,} posteriors in {len(store.shards)} shards read in {opening:.2f} s")
    if forget_pages(store):
        print(f"read from disk per second: {reads_per_second(stored, pictures, views, reads):,.0f}")
    for shard in store.shards:
        with shard.path.open("rb") as file:
            while file.read(1 << 24):
                pass
    print(f"read from memory per second: {reads_per_second(stored, pictures, views, reads):,.0f}")


def measure_start(folder: Path, count: int) -> None:
    (folder / "pictures").mkdir()
    pictures, store = pictures_in(folder / "pictures", count), LatentStore(folder / "other", "benchmark")
    first = timed(lambda: filling.identify(pictures, store, Callbacks()))
    identities = filling.identify(pictures, store, Callbacks())
    keys = filling._keys_of(pictures, identities, np.arange(0, count, MOST_LINKS))
    write(store, [key.tobytes() for key in keys])
    print(f"{count:,} pictures hashed in {first:.2f} s")
    store, before = LatentStore(folder / "other", "benchmark"), memory()
    started = time.process_time()
    identities = filling.identify(pictures, store, Callbacks())
    identified = time.process_time()
    places, missing = filling._search(pictures, store, identities)
    assert not len(missing)
    print(
        f"at the next start, seconds of one core: {identified - started:.2f} to identify the pictures, "
        f"{time.process_time() - identified:.2f} to find their posteriors"
    )
    held = sum(array.nbytes for array in vars(places).values())
    print(
        f"main memory per view: {held / count:.1f} bytes kept, {(memory() - before) / count:.0f} at the start"
    )


if __name__ == "__main__":
    main()
