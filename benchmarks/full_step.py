"""Measure the seconds and peak memory of training steps at SDXL's full size on this machine.

    python benchmarks/make_checkpoint.py model.safetensors
    python dev.py bench full_step model.safetensors

It runs the trainer: base in bfloat16, deltas in float32, rank 64, UNet and both encoders, gradient
checkpointing, the demo's pictures at 256 px. If the principal does not exist, the model is split first, which
is not timed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import psutil
import torch

from spectune.cli.allocators import set_allocators
from spectune.ops.split import split
from spectune.training.callbacks import Callbacks, RunStart, StepInfo
from spectune.training.loop import train
from spectune.training.recipe.recipe import parse_recipe

IMAGES = Path(__file__).resolve().parents[1] / "demo" / "images"


class Printed(Callbacks):
    """Callbacks that print the duration of each step."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def on_message(self, text: str) -> None:
        print(f"{time.perf_counter() - self._began:7.1f} s  {text}", flush=True)

    def on_start(self, start: RunStart) -> None:
        self.on_message(f"{start.trained_parameters / 1e6:.1f} M trained parameters")

    def on_step(self, info: StepInfo) -> None:
        self.on_message(f"step {info.step}: {info.seconds:.1f} s, loss {info.loss:.4f}")


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    memory = psutil.Process().memory_info()
    peak = getattr(memory, "peak_wset", None)
    if peak is not None:
        return peak
    import resource
    import sys

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    set_allocators()
    principal = args.model.parent / f"{args.model.stem}.principal-r{args.rank}.safetensors"
    if not principal.exists():
        split(args.model, args.model.parent, rank=args.rank, with_residual=False)
    with tempfile.TemporaryDirectory(dir=args.model.parent) as output:
        recipe = parse_recipe(
            {
                "model": {"base": args.model, "principal": principal},
                "data": {"folders": [IMAGES], "resolution_px": args.pixels, "cache_latents": False},
                "optimizer": {"name": "adamw", "learning_rate": 1e-4},
                "run": {
                    "name": "full",
                    "output": output,
                    "steps": args.steps,
                    "precision": "bf16",
                    "gradient_checkpointing": True,
                    "tensorboard": False,
                },
            }
        )
        train(recipe, callbacks=[Printed()])
    setup = f"{torch.get_num_threads()} threads, {args.pixels} px, batch 1"
    print(f"{setup}: peak memory {peak_memory() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
