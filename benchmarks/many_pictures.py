"""Measure a folder of many pictures: the time of its index and of a restart, and the memory of a process.

    python dev.py bench many_pictures [--pictures 200000] [--folder FOLDER]

Hard links of a few pictures and captions make the folder. A restart is measured in a fresh process, from the
start of the scan to the first batch plan.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from PIL import Image

from spectune.sdxl.layout import SDXL
from spectune.training.data.buckets import training_buckets
from spectune.training.data.dataset import Pictures, Variation
from spectune.training.data.folders import scan_training
from spectune.training.data.gather import data_hash, data_warnings
from spectune.training.data.plan import BatchPlan, PlannedBatches
from spectune.training.data.tables.index_file import INDEX_NAME
from spectune.training.recipe.defaults import bucket_defaults
from spectune.training.recipe.sections.data import BucketSection, DataSection

SIZES = [(96 + 8 * step, 128 - 4 * step) for step in range(12)]
PROJECTED = 13_000_000


def make_folder(folder: Path, count: int) -> None:
    sources = folder.parent / "sources"
    sources.mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, size in enumerate(SIZES):
        Image.effect_noise(size, 40).convert("RGB").save(sources / f"{number}.jpg")
        (sources / f"{number}.txt").write_text(f"picture number {number}, a photo of noise, gray, abstract")
    for index in range(count):
        for suffix in ("jpg", "txt"):
            os.link(sources / f"{index % len(SIZES)}.{suffix}", folder / f"picture_{index:08}.{suffix}")


def restart(folder: Path) -> dict[str, float]:
    """Scan, place, hash and plan; return seconds and bytes."""
    process = psutil.Process()
    data = DataSection(folders=(folder,))
    data = data.model_copy(update={"bucket": BucketSection(**bucket_defaults(data, SDXL))})
    gc.collect()
    before, started = process.memory_info(), time.perf_counter()
    scan = scan_training(data)
    pictures = Pictures(scan.images, training_buckets(data), Variation.of(data), seed=1)
    data_warnings(scan, pictures, None)
    del scan
    plan = BatchPlan(pictures.buckets(), batch=4, seed=1)
    key = data_hash(pictures)
    (first,) = PlannedBatches(plan, 0, 1)
    seconds = time.perf_counter() - started
    gc.collect()
    after = process.memory_info()
    assert len(first)
    assert key
    shared = getattr(after, "shared", 0) - getattr(before, "shared", 0)
    return {"seconds": seconds, "rss": after.rss - before.rss, "shared": shared}


def in_fresh_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(folder: Path, count: int) -> None:
    few, many = folder / "few", folder / "many"
    for place, number in ((few / "pictures", 1000), (many / "pictures", count)):
        make_folder(place, number)
    index = [sys.executable, "-m", "spectune", "dataset", "index"]
    subprocess.run([*index, few / "pictures"], check=True, capture_output=True)
    started = time.perf_counter()
    subprocess.run([*index, many / "pictures"], check=True, capture_output=True)
    first = time.perf_counter() - started
    small, large = (in_fresh_process("--restart", str(one / "pictures")) for one in (few, many))
    more = count - 1000
    own = (large["rss"] - large["shared"] - small["rss"] + small["shared"]) / more
    shared = (large["shared"] - small["shared"]) / more
    size = (many / "pictures" / INDEX_NAME).stat().st_size
    print(f"| | {count:,} pictures | a picture | {PROJECTED:,} pictures |\n| --- | --- | --- | --- |")
    restarted = large["seconds"]
    rows = [
        row("first index", first / count, count, "s"),
        row("restart, to the first batch plan", restarted / count, count, "s"),
        row("memory of each process", own, count, "B"),
        row("mapped, once for all processes of a host", shared, count, "B"),
        row("index on disk", size / count, count, "B"),
    ]
    print("\n".join(rows))


def row(name: str, each: float, count: int, unit: str) -> str:
    """Return a row of the table: of all pictures, of one and projected."""
    amounts = (each * count, each, each * PROJECTED)
    return f"| {name} | " + " | ".join(f"{amount:,.3g} {unit}" for amount in amounts) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--restart", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.restart is not None:
        print(json.dumps(restart(args.restart)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(Path(folder), args.pictures)


if __name__ == "__main__":
    main()
