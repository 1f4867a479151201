"""8. Which frame? Five frames at rank 16, all with directions of the same length, on the 3D style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments import figures, latent_space, near_full, to_flow
from experiments.experiment import (
    FRAME_RATES,
    FRAMES,
    LENGTH,
    Experiment,
    best,
    best_of_each,
    on_seeds,
    rate_text,
    spread,
    table,
)
from experiments.trial import Trial, load

NAME = "frames"


def framed(frame: str, rate: float, **model: Any) -> Trial:
    return Trial(
        NAME,
        frame,
        rate,
        validate_every=40,
        overrides={"model": {"frame": frame, "frame_norm": LENGTH, **model}},
    )


def sweep() -> list[Trial]:
    return [framed(frame, rate) for frame, rates in FRAME_RATES.items() for rate in rates]


def chosen() -> dict[str, Trial]:
    return best_of_each(sweep())


def repeats() -> list[Trial]:
    return on_seeds(chosen().values())


def plain() -> list[Trial]:
    """Return the trials of plain LoRA from near_full, with every seed."""
    return on_seeds([near_full.chosen()["plain r16"]])


def tasks() -> dict[str, Mapping[str, Sequence[Trial]]]:
    """Return the trials of each frame on each task; three seeds except for some conversions to flow."""
    flow = {"plain": best(to_flow.best_method()), **best_of_each(to_flow.frames_sweep())}
    latents = latent_space.chosen()
    return {
        "style": {"plain": plain(), **_with_seeds(chosen(), repeats(), FRAMES)},
        "new latent space": _with_seeds(latents, latent_space.repeats()),
        "EPS to flow": _with_seeds(flow, to_flow.repeats()),
    }


def searched() -> dict[str, list[Trial]]:
    """Return the searches from which the best rates of each task were chosen."""
    return {
        "style": [*near_full.sweep(), *sweep()],
        "new latent space": latent_space.sweep(),
        "EPS to flow": [*to_flow.best_method(), *to_flow.frames_sweep()],
    }


def _with_seeds(
    chosen: Mapping[str, Trial], repeats: Sequence[Trial], frames: Sequence[str] = ("plain", *FRAMES)
) -> dict[str, list[Trial]]:
    return {
        frame: [trial for trial in repeats if _same(trial, chosen[frame])] or [chosen[frame]]
        for frame in frames
    }


def _same(one: Trial, other: Trial) -> bool:
    return replace(one, seed=1) == replace(other, seed=1)


def page_values() -> dict[str, str]:
    by_task = tasks()
    rows: list[list[str]] = []
    for frame in ("plain", *FRAMES):
        cells = [frame if frame != "plain" else "plain (LoRA)"]
        for task, trials in by_task.items():
            losses = spread(load(trial).final for trial in trials[frame])
            cells.append(f"{losses} (at {rate_text(trials[frame][0], searched()[task])})")
        rows.append(cells)
    plot = figures.dots(
        "evidence_frames.png",
        "3D style, rank 16, each frame at its best constant rate",
        {frame: [load(trial).final for trial in trials] for frame, trials in by_task["style"].items()},
        "validation loss",
    )
    return {"plot": plot, "table": table(["frame", *by_task], rows)}


FRAMES_EXPERIMENT = Experiment(
    NAME, (sweep, repeats), page_values, needs=("near_full", "latent_space", "to_flow")
)
