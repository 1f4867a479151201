"""A run put together: data, model, caches, optimiser, and the state it goes on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim import Optimizer

from spectune.core.low_rank import LowRank
from spectune.files.dtypes import parse_dtype
from spectune.model.inject import Injection
from spectune.model.network import Sdxl
from spectune.model.offload import Offload, offload
from spectune.model.prediction import UNIFORM, LogitNormal, Prediction
from spectune.model.quantize import quantize_layers
from spectune.model.vae_convention import (
    KNOWN_VAES,
    VaeConvention,
    declare_vae,
    merge_conventions,
    resolve_convention,
)
from spectune.model.vae_loading import choose_vae
from spectune.training import state
from spectune.training.aligned_frames import align
from spectune.training.callbacks import Callbacks
from spectune.training.data.dataset import Pictures, Variation
from spectune.training.data.folders import scan_training, scan_validation
from spectune.training.data.gather import (
    check_sizes,
    data_hash,
    data_warnings,
    fill_caches,
    training_sizes,
)
from spectune.training.data.plan import BatchPlan
from spectune.training.denoiser import Denoiser
from spectune.training.ema import MovingAverage
from spectune.training.eps_to_flow.conversion import Conversion
from spectune.training.eps_to_flow.warming import warm_start
from spectune.training.objective.edm2 import LearnedWeighting, weighting_optimizer
from spectune.training.objective.losses import HUBER_C, LOSSES, HuberTurn
from spectune.training.objective.requests import Questions
from spectune.training.objective.target import (
    OBJECTIVES,
    Cost,
    NoiseOptions,
    ObjectiveOptions,
)
from spectune.training.objective.weightings import WEIGHTINGS, WeightingOptions
from spectune.training.optim.groups import build_optimizer, groups_by_part
from spectune.training.prepare import (
    KnownFrames,
    Prepared,
    hash_of_frames,
    model_warnings,
    prepare,
    with_resolved_objective,
)
from spectune.training.recipe.recipe import Recipe
from spectune.training.recipe.sections.model import VaeSection
from spectune.training.validation import HeldOut, encode_held_out


@dataclass
class Run:
    """Everything a run works with; `step` and `position` are where it stands."""

    recipe: Recipe
    accelerator: Accelerator
    hear: Callbacks
    prepared: Prepared
    denoiser: Denoiser
    distributed: nn.Module  # the denoiser as accelerate wraps it
    asking: Questions
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
    waiting: Offload  # networks whose outputs are cached, if the recipe sends them away
    ema: MovingAverage | None = None
    learned: LearnedWeighting | None = None  # the weighting of noise levels, with its own optimiser
    learned_optimizer: Optimizer | None = None
    step: int = 0
    position: int = 0
    validation_before: float | None = None
    validation_after: float | None = None

    @property
    def injection(self) -> Injection:
        return self.prepared.injection

    @property
    def prediction(self) -> Prediction:
        return self.asking.prediction

    @property
    def replaced(self) -> Mapping[str, Tensor]:
        """The tensors that stand in for those of the base, by their names in a checkpoint."""
        return {} if self.asking.conversion is None else self.asking.conversion.warm.tensors

    def frames(self) -> dict[str, LowRank] | None:
        """The frames by layer where the run split the base itself: rounding differs between machines."""
        if self.recipe.model.rank is None:
            return None
        layers = self.injection.layers
        return {name: LowRank(it.frame_down, it.frame_up, it.alpha) for name, it in layers.items()}

    def extras(self) -> dict[str, Any]:
        """What a state holds beside the trained tensors and their optimiser."""
        found: dict[str, Any] = {}
        if self.replaced:
            found["replaced"] = dict(self.replaced)
        if self.ema is not None:
            found["ema"] = {"average": self.ema.average, "steps": self.ema.steps}
        if self.learned is not None and self.learned_optimizer is not None:
            found["edm2"] = {
                "weighting": dict(self.learned.state_dict()),
                "optimizer": self.learned_optimizer.state_dict(),
            }
        return found

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
            optimizer_package=state.package_of(self.recipe.optimizer.name),
        )


# ---------------------------------------------------------------- putting a run together


def assemble(recipe: Recipe, accelerator: Accelerator, hear: Callbacks, resumed: Path | None) -> Run:
    """Everything checked and in place for the first step; nothing is written."""
    warnings = model_warnings(recipe)
    recipe = with_resolved_objective(recipe)
    saved = None if resumed is None else state.load_state(resumed)
    if saved is not None:
        state.check_recipe(saved, recipe.model_dump(mode="json"))
    data = recipe.data
    scan, held_out_scan = scan_training(data), scan_validation(data)
    sizes = training_sizes(data)
    pictures = Pictures(scan.images, sizes, Variation.of(data), seed=recipe.run.seed, masks=data.mask)
    warnings += data_warnings(scan, pictures, held_out_scan)
    for warning in warnings:
        hear.on_message(f"warning: {warning}")
    plan = BatchPlan(pictures.buckets(), batch=recipe.run.batch, seed=recipe.run.seed)
    quantised = recipe.model.quantize != "none"
    prepared = prepare(
        recipe.model,
        known=_known_frames(saved),
        seed=recipe.run.seed,
        # what is quantised goes to the GPU layer by layer: all of it would not fit there before
        device="cpu" if quantised else accelerator.device,
        dtype=parse_dtype(recipe.run.precision),
        trained_dtype=parse_dtype(recipe.run.trained_precision),
        say=hear.on_message,
    )
    if quantised:
        _quantise(prepared, recipe, accelerator.device, hear)
    prepared = with_chosen_vae(prepared, recipe.vae)
    waiting = offload(prepared.model, recipe.run.offload)
    pictures.pixels_per_latent = prepared.model.pixels_per_latent
    check_sizes(prepared.model, sizes)
    denoiser = Denoiser(prepared.model, trains_text=any(part != "unet" for part in recipe.model.parts))
    if recipe.run.gradient_checkpointing:
        denoiser.checkpoint_gradients()
    held_out = [] if held_out_scan is None else encode_held_out(prepared.model, held_out_scan, sizes)
    warnings += fill_caches(recipe, prepared.model, denoiser, pictures, held_out, hear)
    waiting.park()
    asking = Questions(
        prepared=prepared,
        denoiser=denoiser,
        pictures=pictures,
        plan=plan,
        prediction=_prediction(recipe),
        noise=_noise(recipe),
        seed=recipe.run.seed,
        conversion=_conversion(recipe),
    )
    if recipe.objective.start == "warm" and saved is None:
        _warmed(recipe, accelerator, asking, hear)
    if recipe.model.aligned and saved is None:
        prepared, found = _aligned(recipe, accelerator, asking, hear)
        warnings += found
    if recipe.run.compile:
        prepared.model.unet.compile()  # the frames are in place: others would have it compile again
    trained = state.trained_tensors(prepared.injection.named_deltas())
    learned = _learned(recipe, accelerator.device)
    settings = recipe.optimizer
    optimizer = build_optimizer(
        settings.name,
        groups_by_part(trained),
        learning_rate=settings.learning_rate,
        part_learning_rates={str(part): rate for part, rate in settings.part_learning_rates.items()},
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
        asking=replace(asking, prepared=prepared),
        cost=_cost(recipe, learned),
        optimizer=optimizer,
        stepper=stepper,
        base_rates=tuple(group["lr"] for group in optimizer.param_groups),
        trained=trained,
        pictures=pictures,
        plan=plan,
        held_out=held_out,
        data_hash=data_hash(pictures),
        steps=_total_steps(recipe, plan, accelerator.num_processes),
        warnings=warnings,
        files=[],
        waiting=waiting,
        learned=learned,
        learned_optimizer=(
            None
            if learned is None
            else weighting_optimizer(learned, learning_rate=recipe.loss.edm2.learning_rate)
        ),
        ema=None if recipe.run.ema_decay is None else MovingAverage(trained, recipe.run.ema_decay),
    )
    if saved is not None:
        _take_over(run, saved)
    return run


def _noise(recipe: Recipe) -> NoiseOptions:
    return NoiseOptions(recipe.objective.noise_offset, recipe.objective.input_perturbation)


def _conversion(recipe: Recipe) -> Conversion | None:
    section = recipe.objective
    if not section.converts:
        return None
    return Conversion(teaches=section.teacher != "none", bridge_steps=section.bridge_steps)


def _warmed(recipe: Recipe, accelerator: Accelerator, asking: Questions, hear: Callbacks) -> None:
    """Refit the layers that know of noise levels in place; the same tensors on every process."""
    assert asking.conversion is not None
    hear.on_message(f"fitting the start on {recipe.objective.warm_images} images")
    for line in warm_start(asking, images=recipe.objective.warm_images, device=accelerator.device):
        hear.on_message(line)
    warm = asking.conversion.warm
    # GPUs may round differently: all start from the tensors of the first process
    tensors = {name: _from_main(t, accelerator.device).cpu() for name, t in warm.tensors.items()}
    warm.put(asking.prepared.model, tensors)


def _aligned(
    recipe: Recipe, accelerator: Accelerator, asking: Questions, hear: Callbacks
) -> tuple[Prepared, list[str]]:
    """The model with the frames that the first batches of the run give it, and warnings."""
    section, layers = recipe.model, asking.prepared.injection.layers
    assert section.frame in ("gradient", "data")
    hear.on_message(f"finding {section.frame} frames in {section.frame_batches} batches")
    losses = partial(_first_losses, asking, _cost(recipe, None), section.frame_batches, accelerator.device)
    asking.denoiser.train()  # as in training: transformers checkpoints gradients in this mode only
    alignment = align(layers, section.frame, losses, seed=recipe.run.seed, length=section.frame_norm)
    asking.denoiser.eval()
    frames: dict[str, LowRank] = {}
    for name, layer in layers.items():
        frame = alignment.frames.get(name, LowRank(layer.frame_down, layer.frame_up, layer.alpha))
        # GPUs may round differently: all train in the frames of the first process
        down, up = (_from_main(tensor, layer.down.device) for tensor in (frame.down, frame.up))
        layer.reframe(LowRank(down, up, frame.alpha))
        frames[name] = LowRank(down.cpu(), up.cpu(), frame.alpha)
    for warning in alignment.warnings:
        hear.on_message(f"warning: {warning}")
    return replace(asking.prepared, frame_hash=hash_of_frames(frames)), alignment.warnings


def _from_main(tensor: Tensor, device: torch.device) -> Tensor:
    return cast("Tensor", broadcast(tensor.to(device).contiguous()))


def _first_losses(asking: Questions, cost: Cost, count: int, device: torch.device) -> Iterator[Tensor]:
    """The losses of the batches that the training sees first, before anything learned weighs them."""
    for batch, question in asking.first(count, device):
        answer = asking.answer(asking.denoiser, question, batch, step=0)
        costs = cost.images(
            asking.prediction, answer, question, image_weights=batch.weights, mask=batch.masks
        )
        yield costs.mean()


def _known_frames(saved: state.SavedState | None) -> KnownFrames | None:
    if saved is None or saved.frames is None:
        return None
    return KnownFrames(saved.progress.base_hash, saved.frames)


def _prediction(recipe: Recipe) -> Prediction:
    section = recipe.objective
    assert section.kind is not None, "the objective is not resolved"
    levels = (
        LogitNormal(section.flow_times_mean, section.flow_times_std)
        if section.flow_times == "logit_normal"
        else UNIFORM
    )
    options = ObjectiveOptions(
        flow_shift=section.flow_shift or 1.0,
        flow_levels=levels,
        zero_terminal_snr=bool(section.zero_terminal_snr),
    )
    return OBJECTIVES[section.kind](options)


def _quantise(prepared: Prepared, recipe: Recipe, device: torch.device, hear: Callbacks) -> None:
    """Quantise the linear layers of the base in place, say what it cost, and send the model to its device."""
    kind = recipe.model.quantize
    assert kind != "none"
    frames = {
        name: LowRank(layer.frame_down, layer.frame_up, layer.alpha)
        for name, layer in prepared.injection.layers.items()
    }
    report = quantize_layers(prepared.model, None, kind, frames=frames, device=device)
    for part in report.parts:
        hear.on_message(f"{kind} {part}")
    model = prepared.model
    modules: list[nn.Module | None] = [model.unet, model.te1, model.te2, model.vae]
    for module in modules:
        if module is not None:
            module.to(device)


def with_chosen_vae(prepared: Prepared, section: VaeSection) -> Prepared:
    """The model with the autoencoder that the recipe asks for, and the origin that says so."""
    own = prepared.model.layout.vae
    origin = prepared.origin
    usual = KNOWN_VAES["sdxl"] if own is None else VaeConvention(own.scale, own.shift, "zeros")
    convention = resolve_convention(
        section.path,
        name=section.name,
        scale=section.scale,
        shift=section.shift,
        padding=section.padding,
        default=merge_conventions(origin, default=usual),
    )
    if section.path is None and convention == usual:
        return prepared
    model = choose_vae(prepared.model, section.path, convention)
    return replace(prepared, model=model, origin=declare_vae(origin, convention, section.path))


def _cost(recipe: Recipe, learned: LearnedWeighting | None) -> Cost:
    section, name = recipe.loss, _prediction(recipe).name
    options = WeightingOptions(name, scale_v_like_noise=section.scale_v_like_noise)
    if section.min_snr_gamma is not None:
        options = replace(options, min_snr_gamma=section.min_snr_gamma)
    c = HUBER_C if section.huber_c is None else section.huber_c
    return Cost(
        loss=LOSSES[section.kind],
        weighting=WEIGHTINGS[section.weighting],
        options=options,
        turn=HuberTurn(c, section.huber_schedule),
        learned=learned,
    )


def _learned(recipe: Recipe, device: torch.device) -> LearnedWeighting | None:
    if recipe.loss.weighting != "edm2":
        return None
    settings = recipe.loss.edm2
    weighting = LearnedWeighting(settings.fourier_features, importance_gamma=settings.importance_gamma)
    return weighting.to(device)


def _total_steps(recipe: Recipe, plan: BatchPlan, processes: int) -> int:
    if recipe.run.steps is not None:
        return recipe.run.steps
    assert recipe.run.epochs is not None
    return -(-recipe.run.epochs * plan.batches_per_epoch // (recipe.run.accumulation * processes))


def _take_over(run: Run, saved: state.SavedState) -> None:
    warnings = state.check_continues(saved, run.progress())
    saved.restore(run.trained, run.optimizer)
    if run.asking.conversion is not None and "replaced" in saved.extras:
        run.asking.conversion.warm.put(run.prepared.model, saved.extras["replaced"])
    if run.ema is not None:
        run.ema.restore(**saved.extras["ema"])
    if run.learned is not None and run.learned_optimizer is not None:
        run.learned.load_state_dict(saved.extras["edm2"]["weighting"])
        run.learned_optimizer.load_state_dict(saved.extras["edm2"]["optimizer"])
    run.step, run.position = saved.progress.step, saved.progress.position
    run.validation_before = saved.progress.validation_before
    run.warnings += warnings
    for warning in warnings:
        run.hear.on_message(f"warning: {warning}")
    run.hear.on_message(f"going on after step {run.step} from {saved.folder.name}")
