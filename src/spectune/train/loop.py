"""The training run: steps through accelerate, validation, saving, stopping and going on."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import Tensor
from torch.utils.data import DataLoader

from spectune.errors import InputError, SpectuneError
from spectune.train import state
from spectune.train.callbacks import Callbacks, Listeners, RunStart, StepInfo, TensorBoardLog, TrainReport
from spectune.train.data.dataset import Batch, as_it_is
from spectune.train.data.plan import PlannedBatches
from spectune.train.denoiser import checked_latents
from spectune.train.interrupt import StopWish
from spectune.train.objective import ask_at_random
from spectune.train.optim import OPTIMIZERS, finished_weights, rate_factor, step_size
from spectune.train.recipe import Recipe
from spectune.train.run import Run, assemble
from spectune.train.seeds import derived_generator, derived_seed
from spectune.train.validation import held_out_loss
from spectune.weights.adapter import TunedAdapter, save_tuned
from spectune.weights.provenance import Role

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
    resumed = claim_output(recipe, force=force, writes=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    run = assemble(recipe, accelerator, hear, resumed)
    return _run(run)


def claim_output(recipe: Recipe, *, force: bool, writes: bool = True) -> Path | None:
    """The state to go on from, if any.

    Raises InputError when the folder holds results of this name that nothing can go on from.
    """
    output, name = recipe.run.output, recipe.run.name
    states = state.saved_states(output, name)
    if states and recipe.run.resume:
        return states[-1]
    taken = [*states, *state.step_files(output, name)]
    if (final := state.adapter_file(output, name)).exists():
        taken.append(final)
    if taken and not force:
        raise InputError(
            f"{output} already holds {len(taken)} results of a run named {name}, such as {taken[-1].name}",
            hint="give another run.name or run.output, or pass --force to replace them",
        )
    if writes:
        for path in taken:
            state.remove(path)
        output.mkdir(parents=True, exist_ok=True)
    return None


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
    losses: list[Tensor] = []
    seconds, began = 0.0, time.perf_counter()
    for batch in _batches(run, run.position + (run.steps - run.step) * per_step):
        loss, grad_norm = _forward_backward(run, batch)
        losses.append(loss)
        if not accelerator.sync_gradients:
            continue
        run.step += 1
        run.position += per_step
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
        collate_fn=cast("Any", as_it_is),
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(0),  # workers' base seed; nothing random is left to them
    )
    return cast("Iterable[Batch]", run.accelerator.prepare(loader))


def _forward_backward(run: Run, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Loss of one batch, its gradient added; on the last batch of a step also the optimiser's step."""
    accelerator, settings = run.accelerator, run.recipe.optimizer
    seed = run.recipe.run.seed
    # Whatever still draws from the global generator (dropout, stochastic rounding) follows the position too.
    torch.manual_seed(derived_seed(seed, "step", batch.position))
    if not run.distributed.training:
        run.distributed.train()
    grad_norm = None
    with accelerator.accumulate(run.distributed):
        question = ask_at_random(
            run.prediction, _latents(run, batch), derived_generator(seed, "noise", batch.position)
        )
        answer = run.distributed(question.noised, question.timestep, batch.captions, batch.time_ids)
        loss = run.cost(run.prediction, answer, question)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            if settings.max_grad_norm:
                grad_norm = accelerator.clip_grad_norm_(run.parameters, settings.max_grad_norm)
            _set_rates(run)
        run.stepper.step()
        run.stepper.zero_grad()
    return loss.detach(), grad_norm


@torch.no_grad()
def _latents(run: Run, batch: Batch) -> Tensor:
    if batch.latents is not None:
        return batch.latents
    assert batch.pixels is not None
    generator = derived_generator(run.recipe.run.seed, "latents", batch.position)
    return checked_latents(
        run.prepared.model.encode_images(batch.pixels, generator), f"batch {batch.position}"
    )


def _set_rates(run: Run) -> None:
    settings = run.recipe.optimizer
    if OPTIMIZERS[settings.name].schedule_free:
        return
    factor = rate_factor(settings.schedule, run.step, steps=run.steps, warmup_steps=settings.warmup_steps)
    for group, rate in zip(run.optimizer.param_groups, run.base_rates, strict=True):
        group["lr"] = rate * factor


def _step_info(run: Run, losses: Sequence[Tensor], grad_norm: Tensor | None, seconds: float) -> StepInfo:
    loss = float(cast("Tensor", run.accelerator.reduce(torch.stack(list(losses)).mean(), reduction="mean")))
    if not math.isfinite(loss):
        raise SpectuneError(
            f"the loss of step {run.step} is {loss}: nothing of this step is saved",
            hint="lower the learning rate; the run can go on from its last state",
        )
    return StepInfo(
        step=run.step,
        loss=loss,
        learning_rate=run.optimizer.param_groups[0]["lr"],
        grad_norm=None if grad_norm is None else float(grad_norm),
        step_size=step_size(run.optimizer),
        seconds=seconds,
    )


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
    folder = state.state_folder(run.recipe.run.output, run.recipe.run.name, run.step)
    if not folder.exists():
        _save_state(run, folder)
    _save_adapter(run, state.adapter_file(run.recipe.run.output, run.recipe.run.name))


def _validate(run: Run) -> float | None:
    if not run.held_out:
        return None
    settings = run.recipe.run
    with finished_weights(run.optimizer, run.parameters):
        loss = held_out_loss(
            run.denoiser, run.held_out, run.prediction, times=settings.validation_times, batch=settings.batch
        )
    run.hear.on_validation(run.step, loss)
    return loss


def _preview(run: Run) -> None:
    if not run.accelerator.is_main_process:
        return
    run.denoiser.eval()
    with finished_weights(run.optimizer, run.parameters), torch.no_grad():
        run.hear.on_preview(run.step, run.model)


def _save(run: Run) -> None:
    output, name = run.recipe.run.output, run.recipe.run.name
    _save_adapter(run, state.adapter_file(output, name, run.step))
    _save_state(run, state.state_folder(output, name, run.step))


def _save_state(run: Run, folder: Path) -> None:
    if not run.accelerator.is_main_process:
        return
    state.save_state(folder, run.progress(), run.trained, run.optimizer)
    run.files.append(folder)
    state.keep_last(run.recipe.run.output, run.recipe.run.name, run.recipe.run.keep_last)


def _save_adapter(run: Run, path: Path) -> None:
    if not run.accelerator.is_main_process:
        return
    origin = replace(
        run.prepared.origin,
        role=Role.TUNED,
        prediction=run.prediction.name,
        flow_shift=run.recipe.objective.shift if run.prediction.name == "flow" else None,
    )
    with finished_weights(run.optimizer, run.parameters):
        tuned = TunedAdapter(layers=run.injection.deltas(), metadata={}, label=path.name)
        save_tuned(path, tuned, origin, force=True)
    run.files.append(path)
    run.hear.on_save(run.step, path)
