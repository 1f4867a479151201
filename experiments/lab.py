"""Run a trial: a recipe with spectune's trainer, or full fine-tuning on the same batches."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from experiments.trial import Outcome, Trial, save
from spectune.model.offload import StagedModel
from spectune.training import validation
from spectune.training.callbacks import Callbacks, RunStart
from spectune.training.data.plan import PlannedBatches
from spectune.training.loop import train
from spectune.training.objective.noising import noise_at_random
from spectune.training.recipe.recipe import Recipe, parse_recipe
from spectune.training.run import Run
from spectune.training.seeds import derived_generator, derived_seed
from spectune.training.setup import assemble

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "demo" / "base.safetensors"

Sections = Mapping[str, Mapping[str, Any]]


class Recorder(Callbacks):
    """Callbacks that record the curve of validation losses."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, float]] = []
        self.trained_parameters = 0

    def on_start(self, start: RunStart) -> None:
        self.trained_parameters = start.trained_parameters

    def extra(self) -> dict[str, Any]:
        """Return more values for the results."""
        return {}

    def on_validation(self, step: int, loss: float) -> None:
        self.curve.append((step, loss))


def picture_folder(pictures: str, work: Path) -> Path:
    """Return the folder of an image set; unpack it if it is missing."""
    folder = work / pictures
    if not folder.exists():
        partial = work / f"{pictures}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(HERE / "pictures" / f"{pictures}.tar") as tar:
            tar.extractall(partial, filter="data")
        partial.rename(folder)
    return folder


def base_file(trial: Trial, work: Path) -> Path:
    return BASE if trial.base == "base" else work / f"{trial.base}.safetensors"


def recipe_of(trial: Trial, work: Path, more: Sections | None = None) -> Recipe:
    """Return the recipe of a trial: UNet, rank 16, batch 16, AdamW, constant rate, and its overrides."""
    folder = picture_folder(trial.pictures, work)
    sections: dict[str, dict[str, Any]] = {
        "model": {"base": base_file(trial, work), "rank": 16, "parts": ["unet"]},
        "data": {
            "sets": [{"path": folder / "train"}],
            "validation_folder": folder / "held_out",
            "resolution_px": 64,
            "caption": {"dropout_probability": 0.1},
            "cache_folder": work / "latents",
        },
        "objective": {"kind": "eps"},
        "optimizer": {"name": "adamw", "learning_rate": trial.rate, "warmup_steps": 5},
        "run": {
            "name": "trial",
            "output": work / "runs" / trial.key,
            "steps": trial.steps,
            "batch": 16,
            "seed": trial.seed,
            "validate_every_steps": trial.validate_every,
            "tensorboard": False,
        },
    }
    for name, keys in {**trial.overrides, **(more or {})}.items():
        sections[name] = {**sections.get(name, {}), **_resolved(keys, work)}
    return parse_recipe(sections, label=trial.key)


def _resolved(keys: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """Resolve values that start with `work:` to files in the work folder."""
    return {k: work / v[5:] if isinstance(v, str) and v.startswith("work:") else v for k, v in keys.items()}


def run_trial(trial: Trial, work: Path, *, more: Sections | None = None) -> Outcome:
    """Run a trial and save its outcome."""
    work.mkdir(parents=True, exist_ok=True)
    outcome = (train_full if trial.method == "full" else train_recipe)(trial, work, more)
    save(trial, outcome)
    return outcome


def train_recipe(
    trial: Trial, work: Path, more: Sections | None = None, *, recorder: Recorder | None = None
) -> Outcome:
    """Train the recipe of a trial with spectune's trainer."""
    recipe = recipe_of(trial, work, more)
    shutil.rmtree(recipe.run.output, ignore_errors=True)
    recorder = recorder or Recorder()
    if train(recipe, callbacks=[recorder], force=True).interrupted:
        raise KeyboardInterrupt
    if not trial.keep:
        shutil.rmtree(recipe.run.output, ignore_errors=True)
    return Outcome(tuple(recorder.curve), recorder.trained_parameters, recorder.extra())


def train_full(
    trial: Trial,
    work: Path,
    more: Sections | None = None,
    *,
    recorder: Recorder | None = None,
    preview_every: int | None = None,
) -> Outcome:
    """Train every weight of the UNet, with the batches and the noise of the same recipe.

    The recorder gets the model every `preview_every` steps, by default after the last one.
    """
    recorder = recorder or Recorder()
    run = assemble(recipe_of(trial, work, more), Accelerator(), Callbacks())
    run.model.injection.eject()
    unet = run.model.sdxl.unet
    parameters = list(unet.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=trial.rate or 1e-4, weight_decay=0.0)
    curve = [(0, validation_loss(run))]
    for step, draws in enumerate(PlannedBatches(run.data.plan, 0, trial.steps), start=1):
        full_step(run, parameters, optimizer, draws, step)
        if step % trial.validate_every == 0 or step == trial.steps:
            curve.append((step, validation_loss(run)))
        if step % (preview_every or trial.steps) == 0:
            recorder.on_preview(step, StagedModel(run.model.sdxl))
    return Outcome(tuple(curve), sum(weight.numel() for weight in parameters), recorder.extra())


def full_step(
    run: Run, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, draws: Any, step: int
) -> None:
    settings, seed = run.recipe.optimizer, run.recipe.run.seed
    batch = run.data.pictures.__getitems__(draws)
    assert batch.latents is not None
    torch.manual_seed(derived_seed(seed, "step", batch.position))
    run.model.denoiser.train()
    noised = noise_at_random(
        run.objective.prediction,
        batch.latents,
        derived_generator(seed, "noise", batch.position),
        pixels_per_latent=run.model.sdxl.pixels_per_latent,
    )
    predicted = run.model.denoiser(noised.latents, noised.timestep, batch.captions, batch.time_ids)
    run.objective.cost.images(predicted, noised).mean().backward()
    torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = run.optimization.base_rates[0] * settings.rate_factor(step - 1, run.steps)
    optimizer.step()
    optimizer.zero_grad()


def validation_loss(run: Run, denoiser: Any = None) -> float:
    """Return the validation loss of `denoiser`, by default that of the run."""
    settings = run.recipe.run
    return validation.validation_loss(
        denoiser or run.model.denoiser,
        run.data.validation,
        run.objective.prediction,
        times=settings.validation_times,
        batch=settings.batch,
    )
