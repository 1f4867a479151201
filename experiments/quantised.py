"""6. A base in NF4: the error of rounding W or its residual, and the effect on training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from experiments import near_full
from experiments.experiment import Experiment, finals, mean, on_seeds, spread, table
from experiments.lab import BASE, run_trial
from experiments.trial import Outcome, Trial, load, save
from spectune.checkpoints.open import open_checkpoint
from spectune.core.low_rank import product, to_matrix
from spectune.core.split import split_weight
from spectune.model.packed_linear import pack, unpack
from spectune.sdxl.layers import Kind, build_catalogue, layer_weight

NAME = "quantised"
RANKS = (16, 64)
SHAPES = ((1280, 1280), (10240, 1280), (640, 2048))  # layers of SDXL


def trained() -> list[Trial]:
    """Return plain and principal trials on a base in NF4. With the plain frame, W itself is rounded."""
    trials: list[Trial] = []
    for frame in ("plain", "principal"):
        rate = near_full.chosen()[f"{frame} r16"].rate
        trials.append(
            Trial(
                NAME,
                f"nf4 {frame}",
                rate,
                validate_every=40,
                overrides={"model": {"frame": frame, "form": "residual", "quantize": "nf4"}},
            )
        )
    return on_seeds(trials)


def errors() -> Trial:
    """Return the trial that only measures the error of the rounded weights, without training."""
    return Trial(NAME, "errors", None, steps=0)


def trials() -> list[Trial]:
    return [errors(), *trained()]


def run(trial: Trial, work: Path) -> Outcome:
    if trial.key != errors().key:
        return run_trial(trial, work)
    outcome = Outcome(((0, 0.0),), 0, {"base": base_errors(), "synthetic": synthetic_errors()})
    save(trial, outcome)
    return outcome


def base_errors() -> dict[str, dict[str, float]]:
    """Return the relative error of rounding the linear layers of each part: for W, and for R at rank 16."""
    sums: dict[str, list[float]] = {}
    with open_checkpoint(BASE) as source:
        for layer in build_catalogue(source):
            if layer.kind is not Kind.LINEAR:
                continue
            weight = to_matrix(layer_weight(source, layer)).float()
            of_weight, of_residual = squared_errors(weight, 16)
            row = sums.setdefault(layer.part.value, [0.0, 0.0, 0.0])
            row[0] += of_weight
            row[1] += of_residual
            row[2] += float(weight.square().sum())
    return {part: {"W": (w / n) ** 0.5, "R": (r / n) ** 0.5} for part, (w, r, n) in sums.items()}


def synthetic_errors() -> list[dict[str, float]]:
    """Return these errors for matrices of SDXL's sizes with singular values i^-0.4, like trained weights."""
    rows: list[dict[str, float]] = []
    for out, columns in SHAPES:
        weight = spectral(out, columns, power=-0.4)
        size = float(weight.square().sum())
        for rank in RANKS:
            of_weight, of_residual = squared_errors(weight, rank)
            row = {"out": out, "in": columns, "rank": rank}
            rows.append({**row, "W": (of_weight / size) ** 0.5, "R": (of_residual / size) ** 0.5})
    return rows


def squared_errors(weight: Tensor, rank: int) -> tuple[float, float]:
    """Return the squared error of rounding W, and of rounding R next to exact factors of this rank."""
    principal = product(split_weight(weight, rank=rank, store=torch.float32).low_rank)
    residual = weight - principal
    of_weight, of_residual = (
        float((matrix - rounded(matrix)).square().sum()) for matrix in (weight, residual)
    )
    return of_weight, of_residual


def rounded(weight: Tensor) -> Tensor:
    """Round a matrix to NF4 and return it in float32."""
    shape = (weight.shape[0], weight.shape[1])
    return unpack(pack(weight.contiguous(), "nf4"), "nf4", shape, torch.float32)


def spectral(out: int, columns: int, *, power: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    small = min(out, columns)
    u, v = (torch.linalg.qr(torch.randn(n, small, generator=generator))[0] for n in (out, columns))
    return (u * torch.arange(1, small + 1) ** power) @ v.T


def page_values() -> dict[str, str]:
    measured = load(errors()).extra
    parts = [
        [part, *(f"{100 * row[matrix]:.2f} %" for matrix in ("W", "R"))]
        for part, row in measured["base"].items()
    ]
    sizes = [
        [
            f"{row['out']} x {row['in']}",
            str(row["rank"]),
            *(f"{100 * row[matrix]:.2f} %" for matrix in ("W", "R")),
        ]
        for row in measured["synthetic"]
    ]
    in_nf4, in_full = finals(trained()), finals(near_full.repeats())
    losses = [
        [
            name,
            f"{spread(outcome.final for outcome in in_full[f'{frame} r16'])}",
            f"{mean(outcome.before for outcome in in_nf4[f'nf4 {frame}']):.4f}",
            f"{spread(outcome.final for outcome in in_nf4[f'nf4 {frame}'])}",
        ]
        for frame, name in (("plain", "LoRA with W"), ("principal", "principal with R"))
    ]
    return {
        "parts": table(["part of the demo base, r16", "W", "R"], parts),
        "sizes": table(["matrix, singular values i^-0.4", "rank", "W", "R"], sizes),
        "losses": table(["", "full precision", "NF4, before training", "NF4, after training"], losses),
    }


QUANTISED = Experiment(NAME, (trials,), page_values, runner=run, needs=("near_full",))
