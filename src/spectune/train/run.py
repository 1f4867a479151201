"""A run put together: data, model, caches, optimiser, and the state it goes on from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from spectune.errors import InputError
from spectune.model.inject import Injection
from spectune.model.prediction import Prediction
from spectune.model.sdxl import Sdxl
from spectune.train import state
from spectune.train.callbacks import Callbacks
from spectune.train.data.buckets import Size, bucket_sizes
from spectune.train.data.captions import CaptionRules
from spectune.train.data.dataset import Pictures, Variation
from spectune.train.data.folders import Scan, scan_held_out, scan_parents
from spectune.train.data.plan import BatchPlan
from spectune.train.denoiser import Denoiser, encode_captions, encode_pictures
from spectune.train.loss import LOSSES
from spectune.train.objective import OBJECTIVES, Cost
from spectune.train.optim import build_optimizer, groups_by_part
from spectune.train.prepare import (
    KnownFrames,
    Prepared,
    conversion_warnings,
    prepare,
    with_resolved_objective,
)
from spectune.train.recipe import DataSection, Recipe
from spectune.train.validation import HeldOut, encode_held_out
from spectune.train.weighting import WEIGHTINGS, WeightingOptions
from spectune.weights.adapter import LowRank

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Run:
    """Everything a run works with; `step` and `position` are where it stands."""

    recipe: Recipe
    accelerator: Accelerator
    hear: Callbacks
    prepared: Prepared
    denoiser: Denoiser
    distributed: nn.Module  # the denoiser as accelerate wraps it
    prediction: Prediction
    cost: Cost
    optimizer: Optimizer
    stepper: Any  # the optimiser as accelerate wraps it
    base_rates: tuple[float, ...]
    trained: dict[str, nn.Parameter]
    pictures: Pictures
    plan: BatchPlan
    held_out: list[HeldOut]
    data_hash: str
    steps: int
    warnings: list[str]
    files: list[Path]
    step: int = 0
    position: int = 0
    validation_before: float | None = None
    validation_after: float | None = None

    @property
    def injection(self) -> Injection:
        return self.prepared.injection

    def frames(self) -> dict[str, LowRank] | None:
        """The frames by layer where the run split the base itself: rounding differs between machines."""
        if self.recipe.model.rank is None:
            return None
        layers = self.injection.layers
        return {name: LowRank(it.frame_down, it.frame_up, it.alpha) for name, it in layers.items()}

    @property
    def model(self) -> Sdxl:
        """The model with the prediction type that it is trained for."""
        return replace(self.prepared.model, prediction=self.prediction)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.trained.values())

    def progress(self) -> state.Progress:
        return state.Progress(
            step=self.step,
            steps=self.steps,
            position=self.position,
            recipe=self.recipe.model_dump(mode="json"),
            base_hash=self.prepared.origin.base_hash,
            frame_hash=self.prepared.frame_hash,
            data_hash=self.data_hash,
            validation_before=self.validation_before,
            optimizer_package=state.package_of(self.optimizer),
        )


# ---------------------------------------------------------------- putting a run together


def assemble(recipe: Recipe, accelerator: Accelerator, hear: Callbacks, resumed: Path | None) -> Run:
    """Everything checked and in place for the first step; nothing is written."""
    warnings = conversion_warnings(recipe)
    recipe = with_resolved_objective(recipe)
    saved = None if resumed is None else state.load_state(resumed)
    if saved is not None:
        state.check_recipe(saved, recipe.model_dump(mode="json"))
    data = recipe.data
    scan = scan_parents(data.folders, data.caption.extensions)
    held_out_scan = (
        None
        if data.validation_folder is None
        else scan_held_out(data.validation_folder, data.caption.extensions)
    )
    sizes = training_sizes(data)
    pictures = Pictures(scan.images, sizes, _variation(data), seed=recipe.run.seed)
    warnings += _data_warnings(scan, pictures, held_out_scan)
    for warning in warnings:
        hear.on_message(f"warning: {warning}")
    plan = BatchPlan(pictures.buckets(), batch=recipe.run.batch, seed=recipe.run.seed)
    prepared = prepare(
        recipe.model,
        known=_known_frames(saved),
        device=accelerator.device,
        dtype=DTYPES[recipe.run.precision],
        say=hear.on_message,
    )
    _check_sizes(prepared.model, sizes)
    denoiser = Denoiser(prepared.model, trains_text=any(part != "unet" for part in recipe.model.parts))
    if recipe.run.gradient_checkpointing:
        denoiser.checkpoint_gradients()
    held_out = [] if held_out_scan is None else encode_held_out(prepared.model, held_out_scan, sizes)
    _fill_caches(recipe, prepared.model, denoiser, pictures, held_out, hear)
    trained = state.trained_tensors(prepared.injection.named_deltas())
    settings = recipe.optimizer
    optimizer = build_optimizer(
        settings.name,
        groups_by_part(trained),
        learning_rate=settings.learning_rate,
        options=settings.options,
    )
    # The model is on its device already, and its trainable tensors must stay the ones the optimiser holds.
    distributed, stepper = accelerator.prepare(denoiser, optimizer, device_placement=[False, True])
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        hear=hear,
        prepared=prepared,
        denoiser=denoiser,
        distributed=distributed,
        prediction=_prediction(recipe),
        cost=_cost(recipe),
        optimizer=optimizer,
        stepper=stepper,
        base_rates=tuple(group["lr"] for group in optimizer.param_groups),
        trained=trained,
        pictures=pictures,
        plan=plan,
        held_out=held_out,
        data_hash=_data_hash(pictures),
        steps=_total_steps(recipe, plan, accelerator.num_processes),
        warnings=warnings,
        files=[],
    )
    if saved is not None:
        _take_over(run, saved)
    return run


def _known_frames(saved: state.SavedState | None) -> KnownFrames | None:
    if saved is None or saved.frames is None:
        return None
    return KnownFrames(saved.progress.base_hash, saved.frames)


def _prediction(recipe: Recipe) -> Prediction:
    section = recipe.objective
    assert section.kind is not None, "the objective is not resolved"
    return OBJECTIVES[section.kind](section.flow_shift or 1.0)


def training_sizes(data: DataSection) -> tuple[Size, ...]:
    """The sizes in pixels that images are trained at."""
    bucket = data.bucket
    if not bucket.enabled:
        return (Size(data.resolution_px, data.resolution_px),)
    return bucket_sizes(data.resolution_px, minimum=bucket.min_px, maximum=bucket.max_px, step=bucket.step_px)


def _variation(data: DataSection) -> Variation:
    caption = data.caption
    return Variation(
        captions=CaptionRules(caption.shuffle, caption.keep_tokens, caption.dropout_probability),
        flip_probability=data.flip_probability,
        random_crop=data.random_crop,
    )


def _data_warnings(scan: Scan, pictures: Pictures, held_out: Scan | None) -> list[str]:
    found = scan.warnings()
    if held_out is not None:
        found += [f"held-out: {warning}" for warning in held_out.warnings()]
        shared = {image.path.resolve() for image in scan.images} & {
            image.path.resolve() for image in held_out.images
        }
        if shared:
            found.append(
                f"{len(shared)} held-out images are also trained on: their loss says nothing about new images"
            )
    if enlarged := pictures.enlarged():
        found.append(f"{len(enlarged)} images are smaller than their training size and are enlarged")
    return found


def _check_sizes(model: Sdxl, sizes: Iterable[Size]) -> None:
    step = model.pixels_per_latent * 2 ** (len(model.layout.unet.channels) - 1)
    for size in sizes:
        if size.width % step or size.height % step:
            raise InputError(
                f"training size {size.width}x{size.height}: this model needs multiples of {step} pixels",
                hint="change data.resolution_px or data.bucket.step_px",
            )


def _fill_caches(
    recipe: Recipe,
    model: Sdxl,
    denoiser: Denoiser,
    pictures: Pictures,
    held_out: Sequence[HeldOut],
    hear: Callbacks,
) -> None:
    if recipe.caches_latents:
        hear.on_message(f"encoding {len(pictures)} images")
        stage = "encoding images"
        try:
            pictures.latents = encode_pictures(
                model,
                pictures,
                flips=pictures.variation.flips,
                seed=recipe.run.seed,
                progress=partial(hear.on_progress, stage),
            )
        finally:
            # also after an error: a progress bar must give the terminal back
            hear.on_progress(stage, 1, 1)
    if recipe.caches_text:
        captions = {image.caption for image in pictures.images} | {""}
        denoiser.text = encode_captions(model, captions.union(*(group.captions for group in held_out)))


def _cost(recipe: Recipe) -> Cost:
    gamma = recipe.loss.min_snr_gamma
    name = _prediction(recipe).name
    return Cost(
        loss=LOSSES[recipe.loss.kind],
        weighting=WEIGHTINGS[recipe.loss.weighting],
        options=WeightingOptions(name) if gamma is None else WeightingOptions(name, min_snr_gamma=gamma),
    )


def _total_steps(recipe: Recipe, plan: BatchPlan, processes: int) -> int:
    if recipe.run.steps is not None:
        return recipe.run.steps
    assert recipe.run.epochs is not None
    return -(-recipe.run.epochs * plan.batches_per_epoch // (recipe.run.accumulation * processes))


def _data_hash(pictures: Pictures) -> str:
    listed = [
        (image.path.name, image.caption, image.repeats, image.size, target)
        for image, target in zip(pictures.images, pictures.targets, strict=True)
    ]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _take_over(run: Run, saved: state.SavedState) -> None:
    warnings = state.check_continues(saved, run.progress())
    saved.restore(run.trained, run.optimizer)
    run.step, run.position = saved.progress.step, saved.progress.position
    run.validation_before = saved.progress.validation_before
    run.warnings += warnings
    for warning in warnings:
        run.hear.on_message(f"warning: {warning}")
    run.hear.on_message(f"going on after step {run.step} from {saved.folder.name}")
