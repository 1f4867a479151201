"""Difference between training in bfloat16 and in float32 parameters, in the delta and the residual form.

    python dev.py bench forms [--steps 120] [--rank 16]

All runs use the embedded base, the images of the demo, the same batches, the same noise and AdamW. Only the
form and the dtype of the trained tensors differ. The validation loss is on the validation images of the demo,
with fixed noise and noise levels.
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
from spectune.training.objective.target import ask_at_random
from spectune.training.recipe.recipe import parse_recipe
from spectune.training.seeds import derived_generator
from spectune.training.setup import Run, assemble
from spectune.training.validation import held_out_loss

DEMO = Path(__file__).resolve().parents[1] / "demo"


@dataclass(frozen=True)
class Curve:
    """Training losses of all steps, and the validation loss at the end."""

    losses: list[float]
    validation_loss: float
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
            # An optimizer that the recipe allows for bf16 parameters; this script takes its steps with AdamW.
            "optimizer": {"name": "prodigy_plus_schedule_free"},
            "run": {"name": "forms", "output": output, "steps": 1, "batch": 16, **precision},
        }
    )
    return assemble(recipe, Accelerator(cpu=True), Callbacks(), None)


def train(form: str, dtype: torch.dtype, *, rank: int, steps: int, rate: float) -> Curve:
    with tempfile.TemporaryDirectory() as output:
        run = prepared(form, dtype, rank, output)
    optimizer = torch.optim.AdamW(run.parameters, lr=rate, weight_decay=0.0)
    losses: list[float] = []
    for draws in PlannedBatches(run.plan, 0, steps):
        batch = run.pictures.__getitems__(draws)
        assert batch.latents is not None
        noise = derived_generator(1, "noise", batch.position)
        model_input = ask_at_random(run.prediction, batch.latents, noise)
        output = run.denoiser(model_input.noised, model_input.timestep, batch.captions, batch.time_ids)
        loss = run.cost(run.prediction, output, model_input)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    final_loss = held_out_loss(run.denoiser, run.held_out, run.prediction, times=4, batch=16)
    changes = [
        tensor.float().norm() for layer in run.injection.layers.values() for tensor in layer.trained_change()
    ]
    return Curve(losses, final_loss, float(torch.stack(changes).norm()))


def gap(curve: Curve, reference: Curve) -> float:
    """Return the mean absolute difference of two loss curves."""
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
        print("| form | trained in | validation loss | mean gap to float32 | norm of the change |")
        print("| --- | --- | ---: | ---: | ---: |")
        for form in ("delta", "residual"):
            curves: dict[torch.dtype, Curve] = {}
            for dtype in (torch.float32, torch.bfloat16):
                curves[dtype] = train(form, dtype, rank=args.rank, steps=args.steps, rate=rate)
                curve = curves[dtype]
                name = str(dtype).removeprefix("torch.")
                print(
                    f"| {form} | {name} | {curve.validation_loss:.5f} "
                    f"| {gap(curve, curves[torch.float32]):.2e} | {curve.change:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
