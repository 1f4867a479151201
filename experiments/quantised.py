"""6. A base in NF4: what is rounded when the principal is taken out first, and what it does to training."""

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
from spectune.model.quantize import dequantise, quantise
from spectune.sdxl.layers import Kind, build_catalogue, layer_weight

NAME = "quantised"
RANKS = (16, 64)
SHAPES = ((1280, 1280), (10240, 1280), (640, 2048))  # of SDXL


def trained() -> list[Trial]:
    """Plain and principal beside a base in NF4; plain takes nothing out, so W itself is rounded."""
    found: list[Trial] = []
    for frame in ("plain", "principal"):
        rate = near_full.chosen()[f"{frame} r16"].rate
        found.append(
            Trial(
                NAME,
                f"nf4 {frame}",
                rate,
                validate_every=40,
                overrides={"model": {"frame": frame, "form": "residual", "quantize": "nf4"}},
            )
        )
    return on_seeds(found)


def errors() -> Trial:
    """No training: the error of the rounded weights."""
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
    """|W - rounded| / |W| of the linear layers of each part of the base: of W, and of R at rank 16."""
    sums: dict[str, list[float]] = {}
    with open_checkpoint(BASE) as source:
        for layer in build_catalogue(source):
            if layer.kind is not Kind.LINEAR:
                continue
            weight = to_matrix(layer_weight(source, layer)).float()
            whole, rest = squared_errors(weight, 16)
            row = sums.setdefault(layer.part.value, [0.0, 0.0, 0.0])
            row[0] += whole
            row[1] += rest
            row[2] += float(weight.square().sum())
    return {part: {"W": (w / n) ** 0.5, "R": (r / n) ** 0.5} for part, (w, r, n) in sums.items()}


def synthetic_errors() -> list[dict[str, float]]:
    """The same for matrices of SDXL's sizes with singular values i^-0.4, as trained weights have them."""
    rows: list[dict[str, float]] = []
    for out, columns in SHAPES:
        weight = spectral(out, columns, power=-0.4)
        size = float(weight.square().sum())
        for rank in RANKS:
            whole, rest = squared_errors(weight, rank)
            row = {"out": out, "in": columns, "rank": rank}
            rows.append({**row, "W": (whole / size) ** 0.5, "R": (rest / size) ** 0.5})
    return rows


def squared_errors(weight: Tensor, rank: int) -> tuple[float, float]:
    """Squared error of a rounded W, and of a rounded R beside exact factors of this rank."""
    principal = product(split_weight(weight, rank=rank, store=torch.float32).low_rank)
    residual = weight - principal
    whole, rest = (float((it - rounded(it)).square().sum()) for it in (weight, residual))
    return whole, rest


def rounded(weight: Tensor) -> Tensor:
    """A matrix after a way through NF4, float32."""
    shape = (weight.shape[0], weight.shape[1])
    return dequantise(quantise(weight.contiguous(), "nf4"), "nf4", shape, torch.float32)


def spectral(out: int, columns: int, *, power: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    small = min(out, columns)
    u, v = (torch.linalg.qr(torch.randn(n, small, generator=generator))[0] for n in (out, columns))
    return (u * torch.arange(1, small + 1) ** power) @ v.T


def found() -> dict[str, str]:
    measured = load(errors()).extra
    parts = [
        [part, *(f"{100 * row[it]:.2f} %" for it in ("W", "R"))] for part, row in measured["base"].items()
    ]
    sizes = [
        [f"{row['out']} x {row['in']}", str(row["rank"]), *(f"{100 * row[it]:.2f} %" for it in ("W", "R"))]
        for row in measured["synthetic"]
    ]
    in_nf4, in_full = finals(trained()), finals(near_full.repeats())
    losses = [
        [
            name,
            f"{spread(it.final for it in in_full[f'{frame} r16'])}",
            f"{mean(it.before for it in in_nf4[f'nf4 {frame}']):.4f}",
            f"{spread(it.final for it in in_nf4[f'nf4 {frame}'])}",
        ]
        for frame, name in (("plain", "LoRA beside W"), ("principal", "principal beside R"))
    ]
    return {
        "parts": table(["part of the demo base, r16", "W", "R"], parts),
        "sizes": table(["matrix, singular values i^-0.4", "rank", "W", "R"], sizes),
        "losses": table(["", "full precision", "NF4, before", "NF4, after"], losses),
    }


QUANTISED = Experiment(NAME, (trials,), found, runner=run, needs=("near_full",))
