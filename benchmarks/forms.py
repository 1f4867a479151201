"""Measure how much training with bfloat16 parameters differs from float32, in the delta and residual form.

    python dev.py bench forms [--steps 120] [--rank 16]

All runs use the embedded base, the demo's pictures, AdamW, and the same batches and noise. Only the form and
the dtype of the trained tensors differ. The held-out loss is measured on the demo's validation pictures, with
fixed noise and noise levels.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from spectune.training.callbacks import Callbacks
from spectune.training.data.plan import PlannedBatches
from spectune.training.objective.noising import noise_at_random
from spectune.training.recipe.recipe import parse_recipe
from spectune.training.run import Run
from spectune.training.seeds import derived_generator
from spectune.training.setup import assemble
from spectune.training.validation import validation_loss

DEMO = Path(__file__).resolve().parents[1] / "demo"


@dataclass(frozen=True)
class Curve:
    """The training loss of every step, and the final loss on held-out pictures."""

    losses: list[float]
    held_out: float
    change: float  # Frobenius norm of all trained changes


def prepared(form: str, dtype: torch.dtype, rank: int, output: str) -> Run:
    data: dict[str, Any] = {
        "folders": [DEMO / "images"],
        "validation_folder": DEMO / "validation",
        "resolution_px": 64,
    }
    precision = {"trained_precision": "bf16" if dtype == torch.bfloat16 else "fp32"}
    recipe = parse_recipe(
        {
            "model": {"base": DEMO / "base.safetensors", "rank": rank, "form": form, "parts": ["unet"]},
            "data": data,
            "loss": {"weighting": "min_snr"},
            # a recipe needs an optimizer that may train bf16 parameters; the steps here use AdamW
            "optimizer": {"name": "prodigy_plus_schedule_free"},
            "run": {"name": "forms", "output": output, "steps": 1, "batch": 16, **precision},
        }
    )
    return assemble(recipe, Accelerator(cpu=True), Callbacks())


def train(form: str, dtype: torch.dtype, *, rank: int, steps: int, rate: float) -> Curve:
    with tempfile.TemporaryDirectory() as output:
        run = prepared(form, dtype, rank, output)
    optimizer = torch.optim.AdamW(list(run.optimization.parameters.values()), lr=rate, weight_decay=0.0)
    losses: list[float] = []
    for draws in PlannedBatches(run.data.plan, 0, steps):
        batch = run.data.pictures.__getitems__(draws)
        assert batch.latents is not None
        noise = derived_generator(1, "noise", batch.position)
        noised = noise_at_random(run.objective.prediction, batch.latents, noise)
        predicted = run.model.denoiser(noised.latents, noised.timestep, batch.captions, batch.time_ids)
        loss = run.objective.cost.images(predicted, noised).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    held_out = validation_loss(
        run.model.denoiser, run.data.validation, run.objective.prediction, times=4, batch=16
    )
    layers = run.model.injection.layers.values()
    changes = [tensor.float().norm() for layer in layers for tensor in layer.trained_change()]
    return Curve(losses, held_out, float(torch.stack(changes).norm()))


def gap(curve: Curve, reference: Curve) -> float:
    """Return the mean distance of two loss curves."""
    pairs = zip(curve.losses, reference.losses, strict=True)
    return sum(abs(one - other) for one, other in pairs) / len(reference.losses)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-4, 4e-5])
    args = parser.parse_args()
    for rate in args.rates:
        print(f"\nAdamW at {rate:g}, {args.steps} steps of 16, rank {args.rank}\n")
        print("| form | trained in | held-out loss | mean gap to float32 | size of the change |")
        print("| --- | --- | ---: | ---: | ---: |")
        for form in ("delta", "residual"):
            curves: dict[torch.dtype, Curve] = {}
            for dtype in (torch.float32, torch.bfloat16):
                curve = curves[dtype] = train(form, dtype, rank=args.rank, steps=args.steps, rate=rate)
                name = str(dtype).removeprefix("torch.")
                print(
                    f"| {form} | {name} | {curve.held_out:.5f} | {gap(curve, curves[torch.float32]):.2e} "
                    f"| {curve.change:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
