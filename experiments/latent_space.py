"""4. A new latent space: the base learns the latents of an equivariant VAE. Flat images, EPS."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import eq_vae, figures
from experiments.experiment import (
    FRAME_RATES,
    LENGTH,
    Experiment,
    best_of_each,
    finals,
    mean,
    on_seeds,
    rate_text,
    spread,
    steps_text,
    steps_to,
    table,
)
from experiments.lab import run_trial
from experiments.trial import RESULTS, Outcome, Trial

NAME = "latent_space"
OWN = "principal, own lengths"
STEPS = 120
CLOSE = 1.05  # times the final loss of full fine-tuning
NAMES = {"full": "full fine-tuning", "plain": "LoRA r16", OWN: "principal r16"}


def run_of(label: str, rate: float, *, full: bool = False, **model: Any) -> Trial:
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
    trials = [run_of("full", rate, full=True) for rate in (5e-5, 1e-4, 2e-4, 4e-4)]
    trials += [run_of("plain", rate, frame="plain") for rate in (5e-4, 1e-3, 3e-3)]
    trials += [run_of(OWN, rate, frame="principal") for rate in (1e-4, 2e-4, 4e-4, 1e-3)]
    for frame, rates in FRAME_RATES.items():
        trials += [run_of(frame, rate, frame=frame, frame_norm=LENGTH) for rate in rates]
    return trials


def chosen() -> dict[str, Trial]:
    return best_of_each(sweep())


def repeats() -> list[Trial]:
    return on_seeds(chosen().values())


def prepare(work: Path) -> None:
    """Write the VAE, and copy its facts to the results."""
    eq_vae.make(work)
    (RESULTS / NAME).mkdir(parents=True, exist_ok=True)
    shutil.copy(work / eq_vae.FACTS, RESULTS / NAME / "autoencoder.facts")


def run(trial: Trial, work: Path) -> Outcome:
    """Run a trial with the scale and the shift of the new latents."""
    facts = json.loads((work / eq_vae.FACTS).read_text(encoding="utf-8"))
    vae = {**trial.overrides["vae"], "scale": facts["scale"], "shift": facts["shift"]}
    return run_trial(trial, work, more={"vae": vae})


def page_values() -> dict[str, str]:
    outcomes = finals(repeats())
    full = outcomes["full"]
    plot = figures.curves(
        "evidence_latent_space.png",
        "A new latent space, each method at its best constant rate, 3 seeds",
        {NAMES[label]: outcomes[label] for label in NAMES},
        top=2.2 * mean(outcome.final for outcome in full),
    )
    rows: list[list[str]] = []
    reached: dict[str, str] = {}
    for label, trial in chosen().items():
        seeds = outcomes[label]
        reached[label] = _reached(seeds, full)
        rows.append(
            [
                NAMES.get(label, f"{label}, equal lengths"),
                rate_text(trial, sweep()),
                f"{spread(outcome.final for outcome in seeds)}",
                reached[label],
            ]
        )
    facts = json.loads((RESULTS / NAME / "autoencoder.facts").read_text(encoding="utf-8"))
    return {
        "plot": plot,
        "table": table(["method", "rate", "validation loss", "steps to the loss of full + 5 %"], rows),
        "principal": reached[OWN],
        "plain": reached["plain"],
        "steps": str(STEPS),
        "before": f"{mean(outcome.before for outcome in full):.3f}",
        "scale": f"{facts['scale']:.3f}",
        "shift": f"{facts['shift']:.3f}",
        **{
            f"{when}_{what}": f"{decibel:.1f}"
            for when in ("before", "after")
            for what, decibel in facts[when].items()
        },
    }


def _reached(outcomes: Sequence[Outcome], full: Sequence[Outcome]) -> str:
    """Return the steps until a loss 5 % above the final loss of full fine-tuning with the same seed."""
    return steps_text(steps_to(outcomes, (CLOSE * outcome.final for outcome in full)))


LATENT_SPACE = Experiment(NAME, (sweep, repeats), page_values, prepare=prepare, runner=run)
