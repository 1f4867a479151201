"""14. The base moves to 16 latent channels and to flow. Flat images, shift 2.5, one seed."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments import figures, wide_vae
from experiments.experiment import Experiment, best_of_each, rate_text, steps_text, steps_to, table
from experiments.flow_pictures import as_flow, captions_of, strip
from experiments.lab import BASE, Recorder, picture_folder, train_full, train_recipe
from experiments.to_flow import save_strip, strip_file
from experiments.trial import RESULTS, Outcome, Trial, load, save
from spectune.model.offload import StagedModel
from spectune.ops.convert import convert

NAME = "wide_latents"
STEPS = 100
CLOSE = 1.05  # times the final loss of full fine-tuning
INITS = ("zeros", "copy", "fit")
LORA, PRINCIPAL, FULL = "LoRA r16", "principal r16", "full fine-tuning"
DECAY = {"schedule": "polynomial", "power": 0.5}


def base_of(init: str) -> str:
    return f"wide_{init}"


def moved(label: str, rate: float, init: str, *, full: bool = False, **model: Any) -> Trial:
    """Return a conversion to flow of the moved base, at a decaying rate."""
    return Trial(
        NAME,
        f"{label}, {init}",
        rate,
        method="full" if full else "recipe",
        pictures="flat",
        steps=STEPS,
        validate_every=20,
        base=base_of(init),
        overrides={
            "model": {"layers": ("all",), **model},
            "objective": {"kind": "flow", "flow_shift": 2.5},
            "optimizer": DECAY,
        },
    )


def sweep() -> list[Trial]:
    return [
        moved(FULL, 1e-3, "fit", full=True),
        *(moved(LORA, 3e-3, init, frame="plain") for init in reversed(INITS)),
        moved(PRINCIPAL, 1e-3, "fit", frame="principal"),
        moved(FULL, 1e-3, "copy", full=True),
    ]


def prepare(work: Path) -> None:
    """Write the autoencoder and the moved bases, and copy their facts to the results."""
    wide_vae.make(work)
    folder = RESULTS / NAME
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(work / wide_vae.FACTS, folder / "autoencoder.facts")
    for init in INITS:
        if (work / f"{base_of(init)}.safetensors").exists():
            continue
        pictures = {"pictures": picture_folder("flat", work) / "train", "size": 64} if init == "fit" else {}
        report = convert(
            BASE,
            work / f"{base_of(init)}.safetensors",
            latent_channels=wide_vae.CHANNELS,
            vae=work / wide_vae.FILE,
            init=init,
            device="cpu",
            **pictures,
        )
        if init == "fit" and report.latents is not None:
            facts = json.dumps(asdict(report.latents), indent=1)
            (folder / "fit.facts").write_text(facts + "\n", encoding="utf-8")


class StripRecorder(Recorder):
    """A recorder that draws a strip of images at the end."""

    def __init__(self, trial: Trial, work: Path) -> None:
        super().__init__()
        self.trial = trial
        self.captions = captions_of(picture_folder("flat", work) / "held_out")

    def on_preview(self, step: int, model: StagedModel) -> None:
        if step == self.trial.steps:
            save_strip(self.trial, step, strip(model.sdxl, as_flow(model.sdxl, self.captions)))


def run(trial: Trial, work: Path) -> Outcome:
    recorder = StripRecorder(trial, work)
    if trial.method == "full":
        outcome = train_full(trial, work, recorder=recorder)
    else:
        more = {**trial.overrides, "run": {"preview_every_steps": trial.steps}}
        outcome = train_recipe(trial, work, more, recorder=recorder)
    save(trial, outcome)
    return outcome


def page_values() -> dict[str, str]:
    trials = list(best_of_each(sweep()).values())
    outcomes = {trial.label: load(trial) for trial in trials}
    full = min(load(trial).final for trial in trials if trial.method == "full")
    fit = json.loads((RESULTS / NAME / "fit.facts").read_text(encoding="utf-8"))
    facts = json.loads((RESULTS / NAME / "autoencoder.facts").read_text(encoding="utf-8"))
    rows = [
        [
            trial.label,
            rate_text(trial, sweep()),
            f"{outcome.before:.3f}",
            f"{dict(outcome.curve)[STEPS // 5]:.3f}",
            f"{outcome.final:.3f}",
            steps_text(steps_to([outcome], [CLOSE * full])),
        ]
        for trial, outcome in ((trial, outcomes[trial.label]) for trial in trials)
    ]
    heading = ["method, start", "rate", "before", f"after {STEPS // 5}", f"after {STEPS}"]
    plot = figures.curves(
        "evidence_wide_latents.png",
        "To 16 latent channels and to flow, one seed",
        {label: [outcome] for label, outcome in outcomes.items()},
        y_label="flow validation loss",
    )
    strips = {trial.label: strip_file(trial, STEPS) for trial in trials}
    return {
        "plot": plot,
        "sheet": figures.strips("evidence_wide_latents_pictures.png", strips),
        "table": table([*heading, "steps to the loss of full + 5 %"], rows),
        "steps": str(STEPS),
        "lora_steps": steps_text(steps_to([outcomes[f"{LORA}, fit"]], [CLOSE * full])),
        "full_steps": steps_text(steps_to([outcomes[f"{FULL}, fit"]], [CLOSE * full])),
        "psnr": f"{facts['psnr']:.1f}",
        "scale": f"{facts['scale']:.3f}",
        "shift": f"{facts['shift']:.3f}",
        "pictures": str(fit["pictures"]),
        "first_error": f"{fit['first_error']:.2f}",
        "before_error": f"{fit['before_error']:.2f}",
        "error": f"{fit['error']:.2f}",
    }


WIDE_LATENTS = Experiment(NAME, (sweep,), page_values, prepare=prepare, runner=run)
