"""Build a run from a recipe, ready for its first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from spectune.core.low_rank import LowRank
from spectune.files.dtypes import parse_dtype
from spectune.model.device import cpu_warnings
from spectune.model.offload import Network, modules_of, offload
from spectune.model.streamed_layers import stream_weights
from spectune.training import state
from spectune.training.base_file import Log, ReadBase, SavedFrames, frames_of, read_base
from spectune.training.callbacks import Callbacks, WarningLog
from spectune.training.data.buckets import training_buckets, training_sizes
from spectune.training.data.cache.caches import cache_captions
from spectune.training.data.dataset import Batch, Pictures, Variation
from spectune.training.data.encoding import encode_images, with_saved_way, with_way
from spectune.training.data.folders import scan_training, scan_validation
from spectune.training.data.gather import (
    batch_warnings,
    check_sizes,
    data_hash,
    data_warnings,
)
from spectune.training.data.pictures.epoch import described_epoch
from spectune.training.data.plan import BatchPlan
from spectune.training.data.scan import Scan
from spectune.training.denoiser import Denoiser
from spectune.training.ema import MovingAverage
from spectune.training.eps_to_flow.warm_start import FirstBatches, fit_warm_start
from spectune.training.frames.aligned import align
from spectune.training.frames.making import hash_of_frames
from spectune.training.frames.refresh import build_refresher, from_main
from spectune.training.full.steps import tensor_steps
from spectune.training.objective.building import build_objective, build_weighting
from spectune.training.objective.edm2 import WeightingTrainer
from spectune.training.objective.objective import Objective
from spectune.training.optim.groups import build_optimizer, groups_by_part
from spectune.training.processes.agreement import check_equal, on_all, without_paths
from spectune.training.processes.sharing import writes_files
from spectune.training.recipe.defaults import with_defaults
from spectune.training.recipe.recipe import Recipe
from spectune.training.resume.changes import (
    changes_since,
    check_continues,
    check_recipe,
    described,
    recorded,
)
from spectune.training.run import Optimization, Progress, Run, RunData, RunModel
from spectune.training.trainable_model import (
    TrainableModel,
    build_trainable,
    model_warnings,
    quantize,
    with_chosen_vae,
)

FP16_LOSS_SCALE = 4096.0  # of the losses that gradient frames are computed from


def assemble(
    recipe: Recipe, accelerator: Accelerator, callbacks: Callbacks, saved: state.SavedState | None = None
) -> Run:
    """Build a run that is ready for its first step or, with `saved`, for `restore`. Write no files.

    Raises:
        InputError: A file is missing or does not fit the recipe.
    """
    warnings = WarningLog(callbacks)
    warnings.add(model_warnings(recipe))
    recipe = with_defaults(recipe, accelerator.device)
    if saved is not None:
        recipe = with_saved_way(recipe, saved.header.recipe)
        check_recipe(saved, recipe.model_dump(mode="json"))
    # One process of each host updates the indexes of folders before the others read them.
    first = on_all(accelerator, lambda: find_images(recipe, warnings) if writes_files() else None)
    pictures, validation = on_all(accelerator, lambda: first or find_images(recipe, warnings))
    for line in described_epoch(pictures, recipe.run, accelerator.num_processes).split("\n"):
        callbacks.on_message(line)
    device, log = accelerator.device, callbacks.on_message
    base = on_all(accelerator, lambda: read_base(recipe.model, saved=_saved_frames(saved), log=log))
    check_equal(accelerator, lambda: _inputs(recipe, base, pictures, validation))
    frames = frames_of(base, recipe.model, recipe.run.seed, log=log)
    trainable = on_all(accelerator, lambda: _build_model(recipe, device, base, frames, log))
    check_equal(accelerator, lambda: {"the frame": trainable.frame_hash})
    parameters = sum(parameter.numel() for parameter in trainable.sdxl.unet.parameters())
    warnings.add(cpu_warnings(device, parameters))
    if recipe.run.stream:
        _stream(trainable, device, warnings)
    offloaded = offload(trainable.sdxl, recipe.run.offload, working=device)
    model = RunModel(trainable, _build_denoiser(recipe, trainable), offloaded)
    recipe, data = _encode(recipe, model, device, pictures, validation, warnings)
    model.sdxl.unet.to(device)  # last: the encoding needs memory that the UNet would take
    warnings.add(batch_warnings(recipe, data.plan))
    weighting = build_weighting(recipe, accelerator.device)
    objective = build_objective(recipe, model, weighting)
    if saved is None:
        model = _fit_to_first_batches(recipe, accelerator, data, model, objective, warnings)
    if recipe.run.compile:
        model.sdxl.unet.compile()  # after the last change of frames, which would compile again
    return Run(
        recipe=recipe,
        accelerator=accelerator,
        callbacks=callbacks,
        data=data,
        model=model,
        objective=objective,
        optimization=_build_optimization(recipe, accelerator, model, weighting, callbacks),
        steps=total_steps(recipe, data.plan, accelerator.num_processes),
        warnings=warnings,
        refresher=build_refresher(recipe.model, recipe.run.seed, model.injection),
    )


def _inputs(recipe: Recipe, base: ReadBase, pictures: Pictures, validation: Scan | None) -> dict[str, Any]:
    """Return what must be equal on all processes. Paths need not: hosts may mount a folder elsewhere."""
    return {
        "the recipe": repr(without_paths(recipe.model_dump())),
        "the base": base.hash,
        "the images or captions": data_hash(pictures),
        "the validation images": validation and [(one.path.name, one.caption) for one in validation.images],
    }


def restore(run: Run, saved: state.SavedState) -> Progress:
    """Load a saved state into a run that was assembled with it; return the progress to continue from.

    Raises:
        InputError: The state belongs to another run.
    """
    now = run.state_header(Progress())
    run.warnings.add(check_continues(saved, now))
    optimization, conversion = run.optimization, run.objective.conversion
    saved.restore(optimization.parameters, optimization.optimizer)
    for group, rate in zip(optimization.optimizer.param_groups, optimization.base_rates, strict=True):
        group["lr"] = rate  # of this recipe; the state has the rate of the saved one
    if conversion is not None and "replaced" in saved.extras:
        conversion.swapped.put(run.model.sdxl, saved.extras["replaced"])  # without the trained tensors
    if run.refresher is not None and "refresh" in saved.extras:
        run.refresher.restore(saved.extras["refresh"])
    if optimization.average is not None:
        optimization.average.restore(**saved.extras["ema"])
    if optimization.weighting is not None:
        optimization.weighting.load_state_dict(saved.extras["edm2"])
    if optimization.scaler.is_enabled():
        optimization.scaler.load_state_dict(saved.extras["scaler"])
    header = saved.header
    run.callbacks.on_message(f"resuming after step {header.step} from {saved.folder.name}")
    changes = changes_since(saved, now)
    for line in described(changes, saved, now):
        run.callbacks.on_message(line)
    return Progress(
        step=header.step,
        position=header.position,
        first_step=header.step,
        validation_before=header.validation_before,
        changes=(*header.changes, *recorded(changes, header.step)),
    )


# ---------------------------------------------------------------- data


def find_images(recipe: Recipe, warnings: WarningLog) -> tuple[Pictures, Scan | None]:
    """Return the training pictures and the scan of the validation pictures of a complete recipe."""
    data = recipe.data
    scan, validation = scan_training(data), scan_validation(data)
    pictures = Pictures(
        scan.images, training_buckets(data), Variation.of(data), seed=recipe.run.seed, masks=data.mask
    )
    warnings.add(data_warnings(scan, pictures, validation, has_buckets=bool(data.bucket.enabled)))
    return pictures, validation


def _encode(
    recipe: Recipe,
    model: RunModel,
    device: torch.device,
    pictures: Pictures,
    validation: Scan | None,
    warnings: WarningLog,
) -> tuple[Recipe, RunData]:
    """Encode the validation images and fill the caches, with one network at a time on the device.

    Networks that are not offloaded stay there. The recipe is returned with the way of encoding.
    """
    pictures.pixels_per_latent = model.sdxl.pixels_per_latent
    check_sizes(model.sdxl.layout, {*pictures.placements.by_target(), *training_sizes(recipe.data)})
    model.offload.park()
    _place(model, "vae", device)
    with model.offload.at_work("vae"):
        way, groups = encode_images(recipe, model.sdxl, pictures, validation, warnings)
    _place(model, "text", device)
    with model.offload.at_work("text"):
        cache_captions(recipe, model.denoiser, pictures, groups, warnings.callbacks)
    return with_way(recipe, way), RunData(
        pictures=pictures,
        plan=BatchPlan(pictures.buckets(), batch=recipe.run.batch, seed=recipe.run.seed),
        validation=tuple(groups),
        hash=data_hash(pictures),
    )


def _place(model: RunModel, network: Network, device: torch.device) -> None:
    """Move a network to the device unless it is offloaded."""
    if network not in model.offload:
        for module in modules_of(model.sdxl, network):
            module.to(device)


# ---------------------------------------------------------------- model


def _saved_frames(saved: state.SavedState | None) -> SavedFrames | None:
    if saved is None or saved.frames is None:
        return None
    return SavedFrames(saved.header.base_hash, saved.frames)


def _build_model(
    recipe: Recipe, device: torch.device, base: ReadBase, frames: Mapping[str, LowRank], log: Log
) -> TrainableModel:
    assert recipe.run.precision is not None, "the defaults are not filled in"
    trainable = build_trainable(  # in main memory
        recipe.model,
        base=base,
        frames=frames,
        dtype=parse_dtype(recipe.run.precision),
        trained_dtype=parse_dtype(recipe.run.trained_precision),
        log=log,
    )
    if recipe.model.quantize != "none":
        quantize(trainable, recipe.model.quantize, device, log=log)
    return with_chosen_vae(trainable, recipe.vae)


def _stream(trainable: TrainableModel, device: torch.device, warnings: WarningLog) -> None:
    stream = stream_weights(trainable.sdxl, device)
    warnings.callbacks.on_message(
        f"streaming {stream.stored_bytes / 1e9:.2f} GB of frozen weights from main memory"
    )
    if device.type == "cuda" and not stream.is_pinned:
        warnings.add(
            ["the system refused to pin main memory: streaming is slower; close other programs, or quantize"]
        )


def _build_denoiser(recipe: Recipe, trainable: TrainableModel) -> Denoiser:
    denoiser = Denoiser(
        trainable.sdxl,
        trains_text=any(part != "unet" for part in recipe.model.parts),
        max_tokens=recipe.data.caption.max_tokens,
    )
    if recipe.run.gradient_checkpointing:
        denoiser.checkpoint_gradients()
    return denoiser


# ---------------------------------------------------------------- warm start and aligned frames


def _fit_to_first_batches(
    recipe: Recipe,
    accelerator: Accelerator,
    data: RunData,
    model: RunModel,
    objective: Objective,
    warnings: WarningLog,
) -> RunModel:
    """Fit the warm start and compute aligned frames, if the recipe uses them."""
    first_batches = partial(data.first_batches, device=accelerator.device)
    if recipe.objective.start == "warm":
        images = recipe.objective.warm_images
        warnings.callbacks.on_message(f"fitting the warm start on {images} images")
        size = data.pictures.placements[0].target
        line = fit_warm_start(
            objective, first_batches, batches=-(-images // data.plan.batch), pixels=size.width * size.height
        )
        warnings.callbacks.on_message(line)
        _share_swapped_tensors(objective, accelerator.device)
    if not recipe.model.aligned:
        return model
    warnings.callbacks.on_message(
        f"computing {recipe.model.frame} frames from {recipe.model.frame_batches} batches"
    )
    frame_hash = _align_frames(recipe, objective, first_batches, warnings)
    return replace(model, trainable=replace(model.trainable, frame_hash=frame_hash))


def _share_swapped_tensors(objective: Objective, device: torch.device) -> None:
    """Copy the tensors of the first process to all others, because GPUs may round differently."""
    assert objective.conversion is not None
    swapped = objective.conversion.swapped
    tensors = {name: from_main(tensor, device).cpu() for name, tensor in swapped.tensors.items()}
    swapped.put(objective.denoiser.model, tensors)


def _align_frames(
    recipe: Recipe, objective: Objective, first_batches: FirstBatches, warnings: WarningLog
) -> str:
    """Replace the frames of all layers with frames from the first batches; return their hash."""
    section, layers = recipe.model, objective.injection.layers
    assert section.frame in ("gradient", "data")
    # The directions do not depend on the scale; without it, small gradients vanish in fp16.
    scale = FP16_LOSS_SCALE if recipe.run.precision == "fp16" else 1.0
    full = recipe.run.batch

    def losses() -> Iterator[Tensor]:
        return _first_losses(objective, first_batches(section.frame_batches), full=full, scale=scale)

    objective.denoiser.train()  # transformers checkpoints gradients in training mode only
    alignment = align(layers, section.frame, losses, seed=recipe.run.seed, length=section.frame_norm)
    objective.denoiser.eval()
    frames: dict[str, LowRank] = {}
    for name, layer in layers.items():
        frame = alignment.frames.get(name, layer.frame)
        # GPUs may round differently: all processes use the frames of the first one
        down, up = (from_main(tensor, layer.down.device) for tensor in (frame.down, frame.up))
        layer.reframe(LowRank(down, up, frame.alpha))
        frames[name] = LowRank(down.cpu(), up.cpu(), frame.alpha)
    warnings.add(alignment.warnings)
    return hash_of_frames(frames)


def _first_losses(
    objective: Objective, batches: Iterable[Batch], *, full: int, scale: float
) -> Iterator[Tensor]:
    """Yield the loss of each batch times `scale`, without a learned weighting.

    As in training, a batch smaller than `full` images has less weight.
    """
    for batch in batches:
        _, costs = objective.image_costs(objective.denoiser, batch, step=0)
        yield costs.mean() * (scale * len(batch) / full)


# ---------------------------------------------------------------- optimization


def _build_optimization(
    recipe: Recipe,
    accelerator: Accelerator,
    model: RunModel,
    weighting: WeightingTrainer | None,
    callbacks: Callbacks,
) -> Optimization:
    settings, decay = recipe.optimizer, recipe.run.ema_decay
    parameters = model.trainable.trained
    optimizer = build_optimizer(
        settings.name,
        groups_by_part(parameters),
        learning_rate=settings.learning_rate,
        part_learning_rates={str(part): rate for part, rate in settings.part_learning_rates.items()},
        options=settings.options,
    )
    if model.injection.layers:
        factors = model.injection.joined_factors
        factors.prepare(model.sdxl.unet.dtype)
        optimizer.register_step_post_hook(lambda *_: factors.refresh())  # some write through `.data`
    # The model is already on its device. The optimizer refers to its tensors, so they must not be replaced.
    network, stepper = accelerator.prepare(model.denoiser, optimizer, device_placement=[False, True])
    return Optimization(
        network=network,
        parameters=parameters,
        optimizer=optimizer,
        stepper=stepper,
        base_rates=tuple(group["lr"] for group in optimizer.param_groups),
        scaler=GradScaler(accelerator.device.type, enabled=recipe.run.precision == "fp16"),
        average=None if decay is None else MovingAverage(parameters, decay),
        weighting=weighting,
        tensor_steps=tensor_steps(recipe, optimizer, parameters, accelerator, callbacks),
    )


def total_steps(recipe: Recipe, plan: BatchPlan, processes: int) -> int:
    """Return the number of optimizer steps of a run."""
    if recipe.run.steps is not None:
        return recipe.run.steps
    assert recipe.run.epochs is not None
    return -(-recipe.run.epochs * plan.batches_per_epoch // (recipe.run.accumulation * processes))
