"""Stages of benchmarks/gpu.py that make the files and split them."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from PIL import Image

from benchmarks._gpu_rows import Emit, Values, guarded
from benchmarks._gpu_settings import SMALL_PIXELS, Settings
from benchmarks.make_checkpoint import write_checkpoint
from spectune.ops.split import split

PICTURES = 4


def make(settings: Settings, emit: Emit, argument: str) -> None:
    """Make the pictures, and a checkpoint with SDXL's shapes and spectra, computed on the card."""
    make_pictures(settings.pictures, settings.pixels)
    make_pictures(settings.small_pictures, SMALL_PIXELS)

    def made() -> Values:
        if settings.tiny:
            return {"GB": settings.base.stat().st_size / 1e9, "made": "no, embedded"}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        began = time.perf_counter()
        write_checkpoint(settings.base, "full", torch.float16, seed=0, device=device)
        return {
            "GB": settings.base.stat().st_size / 1e9,
            "made": f"on {device}",
            "seconds": time.perf_counter() - began,
        }

    guarded(emit, settings.base.name, made)


def make_pictures(folder: Path, pixels: int) -> None:
    """Write smooth random pictures with one caption, in a folder that an epoch draws once."""
    target = folder / "1_patterns"
    target.mkdir(parents=True)
    for index in range(PICTURES):
        generator = torch.Generator().manual_seed(index)
        noise = torch.randint(0, 255, (8, 8, 3), generator=generator, dtype=torch.uint8)
        picture = Image.fromarray(noise.numpy()).resize((pixels, pixels), Image.Resampling.BICUBIC)
        picture.save(target / f"{index}.png")
        (target / f"{index}.txt").write_text("a colored pattern", encoding="utf-8")


def measure_split(settings: Settings, emit: Emit, argument: str) -> None:
    """Split the checkpoint on a device. The later stages use the principal of `auto`."""
    device = argument
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    def measured() -> Values:
        folder = settings.work if argument == "auto" else settings.work / f"split-{device}"
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        report = split(settings.base, folder, rank=settings.rank, device=device, force=True)
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
        return {
            "seconds": seconds,
            "energy": report.energy,
            "largest excess": report.excess,
            "weights restored": report.share,
            "peak GB on the card": peak,
        }

    guarded(emit, f"on {device}", measured)
