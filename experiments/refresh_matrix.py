"""Refresh on one matrix: how much of a change of full rank does rank 4 learn, with and without refresh?

    PYTHONPATH=src:. python -m experiments.refresh_matrix

A linear layer W (64x64) with a decaying spectrum has to become W + D, where D has full rank and a fifth of
the norm of W, in 200 AdamW steps on random inputs, with a cosine. The table shows |W' - W - D|^2 / |D|^2,
mean of three seeds, each method at the best of five rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.experiment import SEEDS, mean
from spectune.files.provenance import FrameKind
from spectune.model.inject import AdaptedLayer
from spectune.training.frames.making import make_frame
from spectune.training.frames.refresh import Refresher
from spectune.training.recipe.sections.model import ModelSection

SIZE, RANK, STEPS, BATCH = 64, 4, 200, 64
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """Return W and W + D."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SIZE, SIZE, generator=generator) * torch.linspace(2, 0.1, SIZE)
    change = torch.randn(SIZE, SIZE, generator=generator)
    return weight, weight + 0.2 * change * weight.norm() / change.norm()


def left_over(
    seed: int, rate: float, frame: FrameKind, *, every: int = STEPS, warmup: int = 2, keep: bool = False
) -> float:
    """Return the share of D that is not learned; `keep` keeps the state of the optimizer in a refresh."""
    weight, target = problem(seed)
    section = ModelSection(
        base=Path("none"), rank=RANK, frame=frame, refresh_every_steps=every, refresh_warmup_steps=warmup
    )
    base = nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)
    base.weight.data = weight.clone()
    first = make_frame(weight, "layer", section, torch.Generator().manual_seed(seed))
    layer = AdaptedLayer(base, first, "delta", torch.float32)
    refresher = Refresher(section, seed, {"layer": layer}, {})
    optimizer = torch.optim.AdamW([layer.down, layer.up], weight_decay=0.0)
    generator = torch.Generator().manual_seed(100 + seed)
    for step in range(STEPS):
        x = torch.randn(BATCH, SIZE, generator=generator)
        optimizer.zero_grad()
        (layer(x) - x @ target.T).square().mean().backward()
        schedule = (1 + math.cos(math.pi * step / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule * refresher.rate_factor(step)
        optimizer.step()
        if refresher.is_due(step + 1, STEPS):
            state = optimizer.state_dict()
            refresher.refresh(step + 1, optimizer, lambda done, total: None)
            if keep:
                optimizer.load_state_dict(state)
    return float((base.weight - target).square().sum() / (weight - target).square().sum())


def main() -> None:
    frames: tuple[FrameKind, ...] = ("principal", "minor", "svd-down", "plain")
    rows: dict[str, Callable[..., float]] = {
        f"{frame}, {every}": partial(left_over, frame=frame, every=every)
        for frame in frames
        for every in (STEPS, 20, 10)
    }
    plain = partial(left_over, frame="plain", every=10)
    rows |= {f"plain, 10, warm-up {steps}": partial(plain, warmup=steps) for steps in (0, 5)}
    rows["plain, 10, optimizer kept"] = partial(plain, keep=True)
    for label, run in rows.items():
        losses = {rate: mean(run(seed, rate) for seed in SEEDS) for rate in RATES}
        rate = min(losses, key=losses.__getitem__)
        print(f"{label:28} {losses[rate]:.3f} at {rate:g}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
