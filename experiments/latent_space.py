"""4. A new latent space: the base learns the latents of an equivariant autoencoder. Flat pictures, EPS."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from experiments import eq_vae
from experiments.experiment import Experiment, best_of_each, on_seeds
from experiments.frames import FRAMES, LENGTH
from experiments.lab import run_trial
from experiments.trial import RESULTS, Outcome, Trial

NAME = "latent_space"
STEPS = 160


def trial(label: str, rate: float, *, full: bool = False, **model: Any) -> Trial:
    return Trial(
        NAME,
        label,
        rate,
        method="full" if full else "recipe",
        pictures="flat",
        steps=STEPS,
        overrides={"model": model, "vae": {"path": f"work:{eq_vae.FILE}"}},
    )


def sweep() -> list[Trial]:
    found = [trial("full", rate, full=True) for rate in (4e-4, 8e-4)]
    found += [trial("plain", rate, frame="plain") for rate in (1e-3, 3e-3)]
    found += [trial("principal, own lengths", rate, frame="principal") for rate in (4e-4, 1e-3)]
    for frame in FRAMES:
        found += [trial(frame, rate, frame=frame, frame_norm=LENGTH) for rate in (1e-3, 3e-3)]
    return found


def chosen() -> dict[str, Trial]:
    return best_of_each(sweep())


def repeats() -> list[Trial]:
    return on_seeds(chosen().values())


def prepare(work: Path) -> None:
    """The autoencoder, and what is known of it beside the results."""
    eq_vae.make(work)
    (RESULTS / NAME).mkdir(parents=True, exist_ok=True)
    shutil.copy(work / eq_vae.FACTS, RESULTS / NAME / "autoencoder.facts")


def run(trial: Trial, work: Path) -> Outcome:
    """With the scale and the shift that the new latents need."""
    facts = json.loads((work / eq_vae.FACTS).read_text(encoding="utf-8"))
    vae = {**trial.overrides["vae"], "scale": facts["scale"], "shift": facts["shift"]}
    return run_trial(trial, work, more={"vae": vae})


def found() -> dict[str, str]:
    return {}


LATENT_SPACE = Experiment(NAME, (sweep, repeats), found, prepare=prepare, runner=run)
