"""8. Which frame? Five frames at rank 16, every direction of one length, on the 3D style."""

from __future__ import annotations

from typing import Any

from experiments import near_full
from experiments.experiment import Experiment, best_of_each, on_seeds
from experiments.trial import Trial

NAME = "frames"
FRAMES = (
    "principal",
    "minor",
    "gradient",
    "data",
)  # beside plain, whose directions are that long by themselves
LENGTH = 0.577  # 1/sqrt(3), of a row of plain LoRA
RATES = (5e-4, 1e-3, 2e-3)


def framed(frame: str, rate: float, **model: Any) -> Trial:
    return Trial(
        NAME,
        frame,
        rate,
        validate_every=40,
        overrides={"model": {"frame": frame, "frame_norm": LENGTH, **model}},
    )


def sweep() -> list[Trial]:
    return [framed(frame, rate) for frame in FRAMES for rate in RATES]


def chosen() -> dict[str, Trial]:
    return best_of_each(sweep())


def repeats() -> list[Trial]:
    return on_seeds(chosen().values())


def plain() -> list[Trial]:
    """Plain LoRA as near_full has it, on every seed."""
    return on_seeds([near_full.chosen()["plain r16"]])


def found() -> dict[str, str]:
    return {}


FRAMES_EXPERIMENT = Experiment(NAME, (sweep, repeats), found)
