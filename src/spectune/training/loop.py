"""The training run: steps through accelerate, validation, saving, stopping and going on."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import Tensor
from torch.utils.data import DataLoader

from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.writer import save_tuned
from spectune.core.delta import Delta
from spectune.errors import InputError, SpectuneError, some_of
from spectune.files.provenance import NoiseSchedule, Role
from spectune.model.prediction import Flow
from spectune.training import state
from spectune.training.callbacks import Callbacks, Listeners, RunStart, StepInfo, TensorBoardLog, TrainReport
from spectune.training.data.dataset import Batch, keep_batch
from spectune.training.data.plan import PlannedBatches
from spectune.training.interrupt import StopWish
from spectune.training.optim.groups import learning_rates, step_sizes
from spectune.training.optim.modes import finished_weights
from spectune.training.optim.schedules import rate_factor
from spectune.training.recipe.recipe import Recipe
from spectune.training.seeds import derived_seed
from spectune.training.setup import Run, assemble
from spectune.training.validation import held_out_loss

RECENT_STEPS = 20  # for the mean loss in the report


def train(recipe: Recipe, *, callbacks: Sequence[Callbacks] = (), force: bool = False) -> TrainReport:
    """Run a recipe to its end, or on from the newest state in its output folder.

    Ctrl-C and SIGTERM save and return a report that says so. Raises SpectuneError, and InputError before
    any work for files that are missing, unfit or would be overwritten without `force`.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=recipe.run.accumulation,
        dataloader_config=DataLoaderConfiguration(even_batches=False),
        # The last layer of the first encoder feeds nothing: its adapters get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters="te1" in recipe.model.parts)],
    )
    listeners: list[Callbacks] = []
    if accelerator.is_main_process:
        listeners += callbacks
        if recipe.run.tensorboard:
            listeners.append(TensorBoardLog(recipe.run.output / "logs" / recipe.run.name))
    hear = Listeners(listeners)
    claim = claim_output(recipe, force=force)
    run = assemble(recipe, accelerator, hear, claim.resumed)
    accelerator.wait_for_everyone()  # all have seen the folder as it was
    if accelerator.is_main_process:
        for path in claim.replaced:
            state.remove(path)
        recipe.run.output.mkdir(parents=True, exist_ok=True)
    return _run(run)


@dataclass(frozen=True)
class Claim:
    """What a run finds in its output folder: the state to go on from, or what it replaces."""

    resumed: Path | None = None
    replaced: tuple[Path, ...] = ()


def claim_output(recipe: Recipe, *, force: bool) -> Claim:
    """What becomes of what is in the output folder; changes nothing.

    Raises InputError when it holds results of this name that nothing can go on from, or the run's own input.
    """
    output, name = recipe.run.output, recipe.run.name
    taken = state.results(output, name)
    _check_inputs_stay(recipe, taken)
    states = state.saved_states(output, name)
    if states and recipe.run.resume:
        return Claim(resumed=states[-1])
    if taken and not force:
        raise InputError(
            f"{output} already holds {len(taken)} results of a run named {name}, such as {taken[-1].name}",
            hint="give another run.name or run.output, or pass --force to replace them",
        )
    return Claim(replaced=tuple(taken))


def _check_inputs_stay(recipe: Recipe, taken: Sequence[Path]) -> None:
    for key in ("base", "residual", "principal"):
        path: Path | None = getattr(recipe.model, key)
        if path is None or not path.exists():
            continue
        whole = path.resolve()
        for result in taken:
            if result.resolve() in (whole, *whole.parents):
                raise InputError(
                    f"model.{key} is {path}, which this run would replace as its own result {result.name}",
                    hint="give another run.name or run.output",
                )


def _run(run: Run) -> TrainReport:
    first_step = run.step
    if run.validation_before is None and run.step == 0:
        run.validation_before = _validate(run)
    run.hear.on_start(
        RunStart(
            name=run.recipe.run.name,
            steps=run.steps,
            first_step=run.step,
            images=len(run.pictures),
            trained_numbers=sum(parameter.numel() for parameter in run.parameters),
        )
    )
    recent: deque[float] = deque(maxlen=RECENT_STEPS)
    seconds = 0.0
    report = None
    try:
        with StopWish() as wish:
            seconds = _steps(run, wish, recent)
            interrupted = run.step < run.steps
            _finish(run, interrupted=interrupted)
        report = TrainReport(
            steps=run.step,
            first_step=first_step,
            seconds=seconds,
            training_loss=sum(recent) / len(recent) if recent else None,
            validation_before=run.validation_before,
            validation_after=run.validation_after,
            files=tuple(file for file in run.files if file.exists()),
            interrupted=interrupted,
            warnings=tuple(run.warnings),
        )
        return report
    finally:
        # also after an error: a progress bar must give the terminal back
        run.hear.on_end(report or _failed(run, first_step, seconds))


def _failed(run: Run, first_step: int, seconds: float) -> TrainReport:
    return TrainReport(
        run.step,
        first_step,
        seconds,
        None,
        run.validation_before,
        None,
        tuple(run.files),
        True,
        tuple(run.warnings),
    )


def _steps(run: Run, wish: StopWish, recent: deque[float]) -> float:
    """Train until the last step or a wish to stop; returns the seconds spent in steps."""
    if run.step >= run.steps:
        return 0.0
    settings, accelerator = run.recipe.run, run.accelerator
    per_step = settings.accumulation * accelerator.num_processes
    run.distributed.train()  # transformers checkpoints gradients in training mode only
    losses: list[Tensor] = []
    seconds, began = 0.0, time.perf_counter()
    for batch in _batches(run, run.position + (run.steps - run.step) * per_step):
        loss, grad_norm = _forward_backward(run, batch)
        losses.append(loss)
        if not accelerator.sync_gradients:
            continue
        run.step += 1
        run.position += per_step
        if run.ema is not None:
            run.ema.update()
        info = _step_info(run, losses, grad_norm, time.perf_counter() - began)
        losses = []
        seconds += info.seconds
        recent.append(info.loss)
        if run.step % settings.log_every_steps == 0 or run.step == run.steps:
            run.hear.on_step(info)
        if _stop_is_asked(accelerator, wish):
            break
        _between_steps(run)
        began = time.perf_counter()
    return seconds


def _batches(run: Run, stop: int) -> Iterable[Batch]:
    workers = run.recipe.data.workers
    loader: DataLoader[Batch] = DataLoader(
        cast("Any", run.pictures),
        batch_sampler=PlannedBatches(run.plan, run.position, stop),
        collate_fn=cast("Any", keep_batch),
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(0),  # workers' base seed; nothing random is left to them
    )
    return cast("Iterable[Batch]", run.accelerator.prepare(loader))


def _forward_backward(run: Run, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Loss of one batch, its gradient added; on the last batch of a step also the optimiser's step."""
    accelerator = run.accelerator
    seed = run.recipe.run.seed
    # Whatever still draws from the global generator (dropout, stochastic rounding) follows the position too.
    torch.manual_seed(derived_seed(seed, "step", batch.position))
    grad_norm = None
    with accelerator.accumulate(run.distributed):
        question = run.asking.of(batch)
        answer = run.asking.answer(run.distributed, question, batch, step=run.step)
        costs = run.cost.images(
            run.prediction, answer, question, image_weights=batch.weights, mask=batch.masks
        )
        loss = run.cost.of_batch(run.prediction, question, costs)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            grad_norm = _clipped(run)
            _set_rates(run)
            # the same on every process: stochastic rounding must not let their copies drift apart
            torch.manual_seed(derived_seed(seed, "optimiser", run.step))
        run.stepper.step()
        run.stepper.zero_grad()
    if accelerator.sync_gradients:
        _learn_weighting(run)
    # what a learned weighting adds says nothing about the pictures
    return costs.detach().mean(), grad_norm


def _learn_weighting(run: Run) -> None:
    """The step of the learned weighting of noise levels, if there is one."""
    if run.learned is None or run.learned_optimizer is None:
        return
    for parameter in run.learned.parameters():
        parameter.grad = cast("Tensor", run.accelerator.reduce(parameter.grad, reduction="mean"))
    run.learned_optimizer.step()
    run.learned_optimizer.zero_grad()


def _clipped(run: Run) -> Tensor:
    """The norm of all gradients before they are clipped; raises SpectuneError when it is not finite."""
    # a bound of inf leaves the gradients as they are
    bound = run.recipe.optimizer.max_grad_norm or math.inf
    norm = cast("Tensor", run.accelerator.clip_grad_norm_(run.parameters, bound))
    _check_finite("gradient norm", float(norm), run.step + 1)
    return norm


def _check_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise SpectuneError(
            f"the {what} of step {step} is {value}: nothing of this step is saved",
            hint="lower the learning rate; the run can go on from its last state",
        )


def _set_rates(run: Run) -> None:
    settings = run.recipe.optimizer
    if settings.traits.schedule_free:
        return
    factor = rate_factor(
        settings.schedule,
        run.step,
        steps=run.steps,
        warmup_steps=settings.warmup_steps,
        cycles=settings.cycles,
        power=settings.power,
        final_share=settings.final_share,
    )
    for group, rate in zip(run.optimizer.param_groups, run.base_rates, strict=True):
        group["lr"] = rate * factor


def _step_info(run: Run, losses: Sequence[Tensor], grad_norm: Tensor | None, seconds: float) -> StepInfo:
    loss = float(cast("Tensor", run.accelerator.reduce(torch.stack(list(losses)).mean(), reduction="mean")))
    _check_finite("loss", loss, run.step)
    assert grad_norm is not None
    logged = run.step % run.recipe.run.log_every_steps == 0 or run.step == run.steps
    return StepInfo(
        step=run.step,
        loss=loss,
        learning_rates=learning_rates(run.optimizer),
        grad_norm=float(grad_norm),
        step_size=step_sizes(run.optimizer),
        seconds=seconds,
        memory_bytes=memory_in_use(run.accelerator.device),
        delta_norms=delta_norms(run) if logged else {},
    )


def memory_in_use(device: torch.device) -> int:
    """The most that the GPU has held for this process, or what the process holds in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


@torch.no_grad()
def delta_norms(run: Run) -> dict[str, float]:
    """The Frobenius norm of all dA ("down") and all dB ("up") of each part, as `unet.down`."""
    groups: dict[str, list[Tensor]] = {}
    for name, layer in run.injection.layers.items():
        part = name.partition(".")[0]
        down, up = layer.trained_change()
        groups.setdefault(f"{part}.down", []).append(down)
        groups.setdefault(f"{part}.up", []).append(up)
    return {
        name: float(torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).norm())
        for name, tensors in groups.items()
    }


def _stop_is_asked(accelerator: Accelerator, wish: StopWish) -> bool:
    if accelerator.num_processes == 1:
        return wish.asked
    if wish.asked:
        accelerator.set_trigger()
    return bool(accelerator.check_trigger())  # one process heard it, all stop after the same step


def _between_steps(run: Run) -> None:
    settings = run.recipe.run
    last = run.step == run.steps
    if not last and settings.validate_every_steps and run.step % settings.validate_every_steps == 0:
        _validate(run)
    if settings.preview_every_steps and run.step % settings.preview_every_steps == 0:
        _preview(run)
    if not last and settings.save_every_steps and run.step % settings.save_every_steps == 0:
        _save(run)


def _finish(run: Run, *, interrupted: bool) -> None:
    if interrupted:
        _save(run)
        return
    run.validation_after = run.validation_before if run.steps == 0 else _validate(run)
    _save_adapter(run, state.adapter_file(run.recipe.run.output, run.recipe.run.name))
    folder = state.state_folder(run.recipe.run.output, run.recipe.run.name, run.step)
    if not folder.exists():
        _save_state(run, folder)


@contextmanager
def _as_finished(run: Run) -> Iterator[None]:
    """Within, the model is as it would be saved and does not train."""
    run.denoiser.eval()
    with _finished(run):
        yield
    run.distributed.train()


def _finished(run: Run) -> AbstractContextManager[None]:
    """Within, the trained tensors are what is saved: an average, or what a schedule-free optimiser means."""
    if run.ema is not None:
        return run.ema.in_place()
    return finished_weights(run.optimizer, run.parameters)


def _validate(run: Run) -> float | None:
    if not run.held_out:
        return None
    settings = run.recipe.run
    with _as_finished(run):
        loss = held_out_loss(
            run.denoiser, run.held_out, run.prediction, times=settings.validation_times, batch=settings.batch
        )
    run.hear.on_validation(run.step, loss)
    return loss


def _preview(run: Run) -> None:
    if not run.accelerator.is_main_process:
        return
    with _as_finished(run), run.waiting.at_work(), torch.no_grad():
        run.hear.on_preview(run.step, run.model)


def _save(run: Run) -> None:
    output, name = run.recipe.run.output, run.recipe.run.name
    _save_adapter(run, state.adapter_file(output, name, run.step))
    _save_state(run, state.state_folder(output, name, run.step))


def _save_state(run: Run, folder: Path) -> None:
    if not run.accelerator.is_main_process:
        return
    state.save_state(
        folder, run.progress(), run.trained, run.optimizer, frames=run.frames(), extras=run.extras()
    )
    run.files.append(folder)
    state.keep_last(run.recipe.run.output, run.recipe.run.name, run.recipe.run.keep_last)


def _save_adapter(run: Run, path: Path) -> None:
    if not run.accelerator.is_main_process:
        return
    origin = replace(
        run.prepared.origin,
        role=Role.TUNED,
        prediction=run.prediction.name,
        flow_shift=_flow_shift(run),
        noise_schedule=_noise_schedule(run),
    )
    with _finished(run):
        deltas = run.injection.deltas()
        _check_deltas(deltas, run.step)
        tuned = TunedAdapter(layers=deltas, metadata={}, label=path.name, replaced=run.replaced)
        save_tuned(path, tuned, origin, force=True)
    run.files.append(path)
    run.hear.on_save(run.step, path)


def _flow_shift(run: Run) -> float | None:
    """The shift that the trained model is sampled with; one by resolution is that of the recipe's size."""
    if not isinstance(run.prediction, Flow):
        return None
    return run.prediction.shift_at(run.recipe.data.resolution_px**2)


def _noise_schedule(run: Run) -> NoiseSchedule | None:
    if isinstance(run.prediction, Flow):
        return None
    return "zero_terminal_snr" if run.recipe.objective.zero_terminal_snr else "sdxl"


def _check_deltas(deltas: Mapping[str, Delta], step: int) -> None:
    odd = [
        name
        for name, delta in deltas.items()
        if not bool(torch.isfinite(delta.down).all() and torch.isfinite(delta.up).all())
    ]
    if odd:
        raise SpectuneError(
            f"the changes of {len(odd)} layers are not finite after step {step}, nothing is saved: "
            f"{some_of(odd)}",
            hint="lower the learning rate; the run can go on from its last state",
        )
