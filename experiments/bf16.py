"""3. Sixteen bits: the form of the guide and the delta form, trained and stored in bfloat16. 3D style."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from experiments.experiment import Experiment, finals, mean, on_seeds, spread, table
from experiments.lab import recipe_of, train_recipe
from experiments.trial import Outcome, Trial, save
from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.core.delta import Delta, change
from spectune.core.low_rank import LowRank
from spectune.sdxl.layers import build_catalogue

NAME = "bf16"
STEPS = 60


def variant(form: str, precision: str) -> Trial:
    return Trial(
        NAME,
        f"{form} {precision}",
        None,
        steps=STEPS,
        validate_every=STEPS,
        overrides={
            "model": {"form": form},
            "optimizer": {"name": "prodigy_plus_schedule_free", "learning_rate": None, "warmup_steps": 0},
            "run": {"trained_precision": precision},
        },
        keep=True,
    )


def variants() -> list[Trial]:
    """Return trials with ProdigyPlus, as in the guide; it rounds bfloat16 parameters stochastically."""
    forms, precisions = ("residual", "delta"), ("fp32", "bf16")
    return on_seeds([variant(form, precision) for form in forms for precision in precisions])


def run(trial: Trial, work: Path) -> Outcome:
    """Train, then measure the error of storing the result in bfloat16, as factors and as deltas."""
    trained = train_recipe(trial, work)
    recipe = recipe_of(trial, work)
    path = recipe.run.output / "trial.safetensors"
    base = recipe.model.base
    assert base is not None
    with (
        open_checkpoint(base) as source,
        open_adapter(path, build_catalogue(source, all_layers=True)) as tuned,
    ):
        assert isinstance(tuned, TunedAdapter)
        factors, deltas = stored_errors([tuned.layers[name] for name in tuned.layers])
    shutil.rmtree(recipe.run.output, ignore_errors=True)
    extra = {"stored_as_factors": factors, "stored_as_deltas": deltas}
    outcome = replace(trained, extra=extra)
    save(trial, outcome)
    return outcome


def stored_errors(layers: list[Delta]) -> tuple[float, float]:
    """Return the relative error of the change of all weights stored in bfloat16: |stored - true| / |true|.

    The first error is for the trained factors B0+dB and A0+dA next to the residual, the second for dA and dB
    next to their frame.
    """
    as_factors = as_deltas = size = 0.0
    for layer in layers:
        true = change(layer)
        size += float(true.square().sum())
        as_factors += float((_through_factors(layer) - true).square().sum())
        as_deltas += float((change(_through_deltas(layer)) - true).square().sum())
    return (as_factors / size) ** 0.5, (as_deltas / size) ** 0.5


def _through_factors(layer: Delta) -> torch.Tensor:
    """Return the change after storing the trained factors; the residual contains the exact frame."""
    frame = layer.frame
    down, up = (_in_bf16(a.float() + b.float()) for a, b in ((frame.down, layer.down), (frame.up, layer.up)))
    return change(LowRank(down, up, frame.alpha)) - change(frame)


def _through_deltas(layer: Delta) -> Delta:
    return Delta(layer.frame, _in_bf16(layer.down), _in_bf16(layer.up))


def _in_bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16).float()


def page_values() -> dict[str, str]:
    names = {"residual": "factors with a residual (the guide)", "delta": "deltas"}
    rows: list[list[str]] = []
    by_label = finals(variants())
    for label, outcomes in by_label.items():
        form, precision = label.split()
        stored = "stored_as_factors" if form == "residual" else "stored_as_deltas"
        error = mean(outcome.extra[stored] for outcome in outcomes)
        rows.append(
            [
                names[form],
                precision,
                f"{spread(outcome.final for outcome in outcomes):.5f}",
                f"{100 * error:.2f} %",
            ]
        )
    apart = {
        form: max(
            abs(one.final - other.final)
            for one, other in zip(by_label[f"{form} bf16"], by_label[f"{form} fp32"], strict=True)
        )
        for form in names
    }
    header = ["trained", "precision", "validation loss", "error of the change, stored in bf16"]
    return {
        "table": table(header, rows),
        "factors_apart": f"{apart['residual']:.5f}",
        "deltas_apart": f"{apart['delta']:.6f}",
    }


BF16 = Experiment(NAME, (variants,), page_values, runner=run)
