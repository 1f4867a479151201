"""10. The base moves to 16 latent channels and to flow. Flat images, shift 2.5, one seed."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments import wide_vae
from experiments.flow_pictures import as_flow, captions_of, strip
from experiments.lab import BASE, Recorder, picture_folder, train_full, train_recipe
from experiments.to_flow import save_strip
from experiments.trial import RESULTS, Outcome, Trial, save
from spectune.model.offload import StagedModel
from spectune.ops.convert import convert

NAME = "wide_latents"
STEPS, BATCH = 80, 8
INITS = ("zeros", "copy", "fit")
LORA, PRINCIPAL, FULL = "LoRA r16", "principal r16", "full fine-tuning"
DEFAULT = "LoRA r16, default layers"
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
            "run": {"batch": BATCH},
        },
    )


def sweep() -> list[Trial]:
    return [
        moved(LORA, 6e-3, "fit", frame="plain"),
        moved(FULL, 1e-3, "fit", full=True),
        moved(LORA, 6e-3, "copy", frame="plain"),
        moved(FULL, 1e-3, "copy", full=True),
        moved(LORA, 6e-3, "zeros", frame="plain"),
        moved(PRINCIPAL, 1e-3, "fit", frame="principal"),
        moved(FULL, 1e-3, "zeros", full=True),
        moved(DEFAULT, 6e-3, "fit", frame="plain", layers=("default",)),
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
        if init == "fit":
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
        more = {**trial.overrides, "run": {"batch": BATCH, "preview_every_steps": trial.steps}}
        outcome = train_recipe(trial, work, more, recorder=recorder)
    save(trial, outcome)
    return outcome
