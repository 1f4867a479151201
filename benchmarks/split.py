"""How long split, verify and rebuild take beside copying the file, in one run.

    python dev.py bench split                      on the embedded base
    python dev.py bench split model.safetensors    on a checkpoint of yours, at rank 64

Each figure is the median of several runs taken in turn; the ratio is to a plain copy with fsync. Run it
alone: other load on the machine slows an SVD several times, a copy hardly at all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from spectune.rebuild.files import rebuild_checkpoint, split_checkpoint, verify_files

EMBEDDED = Path(__file__).resolve().parents[1] / "demo" / "base.safetensors"
CHUNK_BYTES = 1 << 24


def copy(source: Path, target: Path) -> None:
    """Copy by reading and writing, so that no file system can share blocks; fsync as the writer does."""
    with source.open("rb") as read, target.open("wb") as written:
        while chunk := read.read(CHUNK_BYTES):
            written.write(chunk)
        written.flush()
        os.fsync(written.fileno())


def stages(model: Path, folder: Path, rank: int) -> dict[str, Callable[[], object]]:
    """What is timed, in the order in which each stage finds its input."""
    principal = folder / f"{model.stem}.principal-r{rank}.safetensors"
    residual = folder / f"{model.stem}.residual.safetensors"
    return {
        "copy with fsync": lambda: copy(model, folder / "copy"),
        "split": lambda: split_checkpoint(model, folder, rank=rank, force=True),
        "split, fp32 residual": lambda: split_checkpoint(
            model, folder, rank=rank, residual_dtype=torch.float32, force=True
        ),
        "verify": lambda: verify_files(model, residual, principal),
        "rebuild": lambda: rebuild_checkpoint(principal, residual, folder / "whole.safetensors", force=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=EMBEDDED)
    parser.add_argument("--rank", type=int, help="16 for the embedded base, 64 for others if not given")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    rank = args.rank or (16 if args.model == EMBEDDED else 64)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=args.model.parent) as name:
        for _ in range(args.runs):
            for title, stage in stages(args.model, Path(name), rank).items():
                started = time.perf_counter()
                stage()
                seconds.setdefault(title, []).append(time.perf_counter() - started)
    medians = {title: statistics.median(taken) for title, taken in seconds.items()}
    print(f"{args.model.name}, rank {rank}, {torch.get_num_threads()} threads, median of {args.runs}\n")
    print("| stage | seconds | of a copy |\n| --- | ---: | ---: |")
    for title, median in medians.items():
        print(f"| {title} | {median:.2f} | {median / medians['copy with fsync']:.1f} |")


if __name__ == "__main__":
    main()
