"""What a run would do: `spectune train --dry-run` opens every file and computes this, and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import psutil

from spectune.adapters.adapter import Adapter
from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.dtypes import parse_dtype
from spectune.files.source import WeightSource
from spectune.model.device import cpu_warnings, describe_device, parse_device, total_memory
from spectune.sdxl.layers import Catalogue, build_catalogue
from spectune.sdxl.layout import Layout
from spectune.sdxl.selection import select_layers
from spectune.training import output
from spectune.training.callbacks import Callbacks, WarningLog
from spectune.training.data.buckets import training_sizes
from spectune.training.data.cache.caches import latent_bytes, latent_folder
from spectune.training.data.dataset import Pictures
from spectune.training.data.gather import check_sizes
from spectune.training.data.plan import BatchPlan
from spectune.training.memory.account import Memory, Setup
from spectune.training.memory.meter import MemoryMeter
from spectune.training.recipe.defaults import described_defaults, run_layout, with_defaults
from spectune.training.recipe.recipe import Recipe
from spectune.training.saving.disk import SavePlan, free_disk, shown_size
from spectune.training.saving.intervals import Task, is_due, previews_at_end
from spectune.training.setup import find_images, total_steps
from spectune.training.trainable_model import model_warnings


@dataclass(frozen=True)
class PictureCounts:
    """The pictures of a run."""

    training: int
    validation: int
    draws_per_epoch: int  # with repeats
    sizes: Mapping[str, int]  # training size -> pictures


@dataclass(frozen=True)
class RunSchedule:
    """The steps of a run, and what is written between them."""

    steps: int
    first_step: int  # above 0 if the run resumes
    steps_per_epoch: float
    pictures_per_step: int
    saves: int
    previews: int
    validations: int

    @property
    def epochs(self) -> float:
        """The number of passes over all pictures."""
        return self.steps / self.steps_per_epoch if self.steps_per_epoch else 0.0


@dataclass(frozen=True)
class Space:
    """Bytes that a run needs and that there are; `available` is None where it is not known."""

    required: int
    available: int | None

    @property
    def fits(self) -> bool:
        return self.available is None or self.required <= self.available


@dataclass(frozen=True)
class TrainForecast:
    """A run before it starts."""

    recipe: Recipe  # with overrides and defaults
    chosen: str  # the defaults that depend on the base
    base: str
    device: str
    pictures: PictureCounts
    schedule: RunSchedule
    memory: Space  # of the GPU, or main memory without one
    latents: str  # where they are kept
    saves: str  # that the run keeps, with their sizes
    disk: Space
    warnings: tuple[str, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """What would stop the run."""
        rows = [(self.memory, "memory", self.device), (self.disk, "disk space", "the disk of run.output")]
        return tuple(
            f"not enough {kind}: the run needs about {space.required / 1e9:.2f} GB, and {place} has "
            f"{(space.available or 0) / 1e9:.2f} GB"
            for space, kind, place in rows
            if not space.fits
        )


def forecast(requested: Recipe, *, force: bool) -> TrainForecast:
    """Check everything that a run needs, and return what it would do. Write no file.

    Raises:
        InputError: A file is missing, damaged or of the wrong kind, or the recipe does not fit them.
    """
    device = parse_device(requested.run.device)
    recipe = with_defaults(requested, device)
    claim = output.claim_output(recipe, force=force)
    warnings = WarningLog(Callbacks())
    warnings.add(model_warnings(requested))
    pictures, validation = find_images(recipe, warnings)
    with open_checkpoint(recipe.model.checkpoint) as base:
        label, layout = base.label, run_layout(base, recipe.vae)
        setup = setup_of(recipe, _rank(recipe, base))
        meter = MemoryMeter(layout, build_catalogue(base))
        refreshed = _refreshed_bytes(recipe, base)
    check_sizes(layout, training_sizes(recipe.data))
    memory = meter.measure(setup)
    warnings.add(cpu_warnings(device, memory.fixed.unet // 2))
    buckets = pictures.buckets()
    plan = BatchPlan(buckets, batch=recipe.run.batch, seed=recipe.run.seed)
    first_step = output.step_of(claim.states[-1]) if claim.states else 0
    schedule = _schedule(recipe, plan, first_step, validates=validation is not None)
    saves = _saves(recipe, memory, schedule.saves, refreshed)
    latents, written = _latents(recipe, pictures, layout)
    return TrainForecast(
        recipe=recipe,
        chosen=described_defaults(requested, recipe),
        base=label,
        device=describe_device(device),
        pictures=PictureCounts(
            training=len(pictures),
            validation=0 if validation is None else len(validation.images),
            draws_per_epoch=sum(members.draws for members in buckets.values()),
            sizes={
                f"{size.width}x{size.height}": len(members)
                for size, members in sorted(buckets.items(), key=lambda one: -len(one[1]))
            },
        ),
        schedule=schedule,
        memory=_memory(memory, device),
        latents=latents,
        saves=str(saves),
        disk=Space(saves.nbytes + written, free_disk(recipe.run.output)),
        warnings=tuple(warnings.entries),
    )


def setup_of(recipe: Recipe, rank: int | Literal["full"]) -> Setup:
    """Return the settings of a complete recipe that determine its memory."""
    run = recipe.run
    assert run.precision is not None, "the defaults are not filled in"
    return Setup(
        rank=rank,
        parts=recipe.model.parts,
        resolution_px=recipe.data.resolution_px,
        max_tokens=recipe.data.caption.max_tokens,
        batch=run.batch,
        form=recipe.model.form,
        quantize=recipe.model.quantize,
        precision=run.precision,
        trained_precision=run.trained_precision,
        gradient_checkpointing=bool(run.gradient_checkpointing),
        offload=run.offload,
        stream=run.stream,
        optimizer=recipe.optimizer.name,
        ema=run.ema_decay is not None,
        step_in_backward=not recipe.backward_obstacle and recipe.optimizer.step_in_backward is not False,
    )


def _rank(recipe: Recipe, base: WeightSource) -> int | Literal["full"]:
    """Return the rank of the recipe, or the largest rank in the principal file."""
    if recipe.model.rank is not None:
        return recipe.model.rank
    path = recipe.model.start or recipe.model.principal
    assert path is not None
    catalogue: Catalogue = build_catalogue(base, all_layers=True)
    with open_adapter(path, catalogue) as principal:
        if recipe.model.start is None and not isinstance(principal, Adapter):
            raise InputError(
                f"{principal.label} holds trained deltas: expected a principal",
                hint="set model.principal to a file that `spectune split` wrote",
            )
        return max((principal.rank(name) for name in principal.layers), default=1)


def _schedule(recipe: Recipe, plan: BatchPlan, first_step: int, *, validates: bool) -> RunSchedule:
    run = recipe.run
    steps = total_steps(recipe, plan, 1)
    span = (plan.batches_per_epoch, run.accumulation)

    def times(task: Task, *, last: int = steps) -> int:
        numbers = range(first_step + 1, last + 1)
        return sum(
            is_due(run, task, step=number, position=number * run.accumulation, span=span)
            for number in numbers
        )

    return RunSchedule(
        steps=steps,
        first_step=first_step,
        steps_per_epoch=plan.batches_per_epoch / run.accumulation,
        pictures_per_step=run.batch * run.accumulation,
        saves=times("save", last=steps - 1),  # the end is always saved
        previews=times("preview") + previews_at_end(run) + run.preview_at_start,
        validations=times("validate") + 2 if validates else 0,
    )


def _memory(memory: Memory, device: str) -> Space:
    if device.startswith("cuda"):
        return Space(memory.total, total_memory())
    # without the context of CUDA, which the reserve contains
    required = max(memory.allocated, memory.encoding["float32"], memory.encoding_text)
    return Space(required, psutil.virtual_memory().available)


def _latents(recipe: Recipe, pictures: Pictures, layout: Layout) -> tuple[str, int]:
    """Return where a run keeps its latents, and the bytes that it will write into its output folder."""
    if not recipe.caches_latents:
        return "encoded at each draw", 0
    nbytes, folder = latent_bytes(pictures, layout), latent_folder(recipe, pictures, layout)
    size = shown_size(nbytes)
    if folder is None:
        return f"{size} in the main memory of each process", 0
    is_own = recipe.data.cache_folder is None
    return f"{size} in {folder}", nbytes if is_own and not folder.exists() else 0


def _refreshed_bytes(recipe: Recipe, base: WeightSource) -> int:
    """Return the bytes of the weights that a refresh changes; 0 without one."""
    section = recipe.model
    if section.refresh_every_steps is None:
        return 0
    assert recipe.run.precision is not None, "the defaults are not filled in"
    layers = select_layers(build_catalogue(base, all_layers=True), section.layers)
    numel = sum(math.prod(layer.shape) for layer in layers if layer.part.value in section.parts)
    return numel * parse_dtype(recipe.run.precision).itemsize


def _saves(recipe: Recipe, memory: Memory, saves: int, refreshed: int) -> SavePlan:
    """Return the saves that a run keeps, with bytes that the account of its memory gives."""
    fixed, run = memory.fixed, recipe.run
    frames = fixed.frame if recipe.model.frame_rank is not None else 0
    return SavePlan.of(
        run,
        saves,
        adapter_bytes=refreshed or fixed.frame + fixed.trained,
        # the weights, and the rests of their rounding to 16 bits
        state_bytes=fixed.trained
        + memory.optimizer
        + memory.average
        + frames
        + refreshed * (1 if run.precision == "fp32" else 2),
    )
