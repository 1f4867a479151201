"""The experiments by name."""

from __future__ import annotations

from experiments.bf16 import BF16
from experiments.encoders import ENCODERS
from experiments.experiment import Experiment
from experiments.forgetting import FORGETTING
from experiments.frames import FRAMES_EXPERIMENT
from experiments.half_steps import HALF_STEPS
from experiments.large_data import LARGE_DATA
from experiments.latent_space import LATENT_SPACE
from experiments.near_full import NEAR_FULL
from experiments.quantised import QUANTISED
from experiments.read_through import READ_THROUGH
from experiments.refresh import REFRESH
from experiments.sensitivity import SENSITIVITY
from experiments.tenth import TENTH
from experiments.to_flow import TO_FLOW
from experiments.wide import WIDE
from experiments.wide_latents import WIDE_LATENTS

__all__ = ["EXPERIMENTS", "Experiment"]

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        NEAR_FULL,
        HALF_STEPS,
        SENSITIVITY,
        BF16,
        LATENT_SPACE,
        TO_FLOW,
        QUANTISED,
        ENCODERS,
        FRAMES_EXPERIMENT,
        FORGETTING,
        TENTH,
        LARGE_DATA,
        WIDE,
        READ_THROUGH,
        WIDE_LATENTS,
        REFRESH,
    )
}
