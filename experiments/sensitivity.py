"""2. Without tuning: learning rates over two decades, and ProdigyPlus, which finds its own. The 3D style."""

from __future__ import annotations

from dataclasses import replace

from experiments import near_full
from experiments.experiment import Experiment, on_seeds
from experiments.trial import Trial

NAME = "sensitivity"
RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 2e-3, 5e-3)
FRAMES = ("plain", "principal")


def rates() -> list[Trial]:
    """Two decades; what near_full has run already is taken from there."""
    known = {trial.key: trial for trial in near_full.sweep()}
    found: list[Trial] = []
    for frame in FRAMES:
        for rate in RATES:
            trial = near_full.framed(frame, 16, rate)
            found.append(trial if trial.key in known else replace(trial, experiment=NAME, validate_every=120))
    return found


def prodigy() -> list[Trial]:
    found = [
        Trial(
            NAME,
            f"prodigy {frame}",
            None,
            validate_every=40,
            overrides={
                "model": {"frame": frame},
                "optimizer": {
                    "name": "prodigy_plus_schedule_free",
                    "learning_rate": None,
                    "warmup_steps": 0,
                },
            },
        )
        for frame in FRAMES
    ]
    return on_seeds(found)


def own() -> list[Trial]:
    return [trial for trial in [*rates(), *prodigy()] if trial.experiment == NAME]


def found() -> dict[str, str]:
    return {}


SENSITIVITY = Experiment(NAME, (own,), found)
