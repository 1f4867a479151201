"""Run a recipe: train, validate, and write the files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from spectune.errors import counted
from spectune.model.device import describe_device, parse_device
from spectune.training import output
from spectune.training.callbacks import (
    CallbackList,
    Callbacks,
    Request,
    RunStart,
    TrainReport,
    WarningLog,
    stage,
)
from spectune.training.callbacks.trackers import TrackerLog, check_trackers, tensorboard_line
from spectune.training.data.dataset import Batch, keep_batch
from spectune.training.data.plan import PlannedBatches
from spectune.training.interrupt import StopRequest, ignore_interrupts
from spectune.training.processes.agreement import on_all, on_main
from spectune.training.processes.engine import (
    described_processes,
    lost_connection_explained,
    make_accelerator,
    unused_gpus,
)
from spectune.training.processes.stopping import held_signals
from spectune.training.recipe.defaults import described_defaults, with_defaults
from spectune.training.recipe.recipe import Recipe
from spectune.training.resume.divergence import NotFinite, divergence_hint, sound_states
from spectune.training.resume.lock import locked_output
from spectune.training.resume.newest import fallback_warnings, load_newest, save_after_error, set_aside
from spectune.training.run import RECENT_STEPS, Progress, Run
from spectune.training.saving.disk import disk_warnings, plan_saves
from spectune.training.saving.intervals import SaveClock, agreed, is_due, previews_at_end
from spectune.training.setup import assemble, restore
from spectune.training.state import DamagedState, SavedState
from spectune.training.train_step import step_info, train_batch
from spectune.training.validation import validation_loss

RESIDUAL_NORM_STEPS = 50  # steps between logs of the size of the change in the residual form


def train(recipe: Recipe, *, callbacks: Sequence[Callbacks] = (), force: bool = False) -> TrainReport:
    """Train as the recipe describes; resume from the newest state in its output folder, if there is one.

    Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal stop after the current step and save a state. The report
    then has `interrupted` set. One process that gets a signal stops all.

    Raises:
        InputError: Before any work: a file is missing, does not fit, or would be overwritten without `force`.
        SpectuneError: Training failed, for example because the loss is not finite.
    """
    device = parse_device(recipe.run.device)
    requested, recipe = recipe, with_defaults(recipe, device)
    check_trackers(recipe)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    accelerator = make_accelerator(recipe)
    main = accelerator.is_main_process
    observers = CallbackList(_main_callbacks(recipe, callbacks) if main else [])
    warnings = WarningLog(observers)
    observers.on_message(
        f"training on {describe_device(accelerator.device)}, {recipe.run.precision} model, "
        f"{recipe.run.trained_precision} trained tensors"
    )
    if chosen := described_defaults(requested, recipe):
        observers.on_message(f"chosen for a base of SDXL's size: {chosen}")
    if "tensorboard" in recipe.run.all_trackers:
        observers.on_message(f"to watch the run: {tensorboard_line(recipe)}")
    if line := described_processes(accelerator, recipe):
        observers.on_message(line)
    warnings.add(unused_gpus(accelerator, recipe))
    with ExitStack() as stack:
        if accelerator.num_processes > 1:
            stack.enter_context(lost_connection_explained(accelerator, recipe))
            stack.enter_context(held_signals())
        claim, saved, damaged = on_main(
            accelerator, lambda: _claimed(recipe, stack, force=force, warn=lambda text: warnings.add([text]))
        )
        warnings.add(fallback_warnings(damaged, saved))
        run = assemble(recipe, accelerator, observers, saved)
        progress = Progress() if saved is None else on_all(accelerator, lambda: restore(run, saved))
        run.warnings.entries[:0] = warnings.entries
        on_all(accelerator, lambda: None)  # a signal before the first step
        if main:
            output.prepare_output(recipe, claim)
            set_aside([state for state in claim.states if saved and state > saved.folder])
        report = _run(run, progress)
        # A launcher would end the main process, which saves, if another one ended first.
        with suppress(RuntimeError) if main else nullcontext():
            accelerator.wait_for_everyone()
        return report


def _claimed(
    recipe: Recipe, stack: ExitStack, *, force: bool, warn: Callable[[str], None]
) -> tuple[output.Claim, SavedState | None, list[DamagedState]]:
    """Lock the output folder until `stack` ends; return the claim on it and the state to resume from."""
    stack.enter_context(locked_output(recipe.run.output, recipe.run.name, warn))
    output.restore_leftovers(recipe)  # a state that was being replaced
    claim = output.claim_output(recipe, force=force)
    return claim, *load_newest(claim.states)


def _main_callbacks(recipe: Recipe, callbacks: Sequence[Callbacks]) -> list[Callbacks]:
    return [*callbacks, *(TrackerLog(name, recipe) for name in recipe.run.all_trackers)]


def _run(run: Run, progress: Progress) -> TrainReport:
    _announce_saves(run, progress)
    if progress.step == 0 and progress.validation_before is None:
        progress.validation_before = _validate(run, progress)
    run.callbacks.on_start(
        RunStart(
            name=run.recipe.run.name,
            steps=run.steps,
            first_step=progress.first_step,
            images=len(run.data.pictures),
            trained_parameters=sum(tensor.numel() for tensor in run.optimization.parameters.values()),
            captions=run.data.captions,
            output=run.recipe.run.output,
        )
    )
    is_complete = False
    try:
        with StopRequest(run.callbacks.on_message) as stop:
            if run.recipe.run.preview_at_start and progress.step == 0:
                _preview(run, progress)
            _train_steps(run, progress, stop)
            _finish(run, progress)
        is_complete = progress.step >= run.steps
    except NotFinite as error:
        error.hint = _divergence_hint(run, progress)
        raise
    except Exception:
        save_after_error(run, progress)
        raise
    finally:
        # also after an error: the progress bar must release the terminal
        report = _report(run, progress, interrupted=not is_complete)
        run.callbacks.on_end(report)
    return report


def _announce_saves(run: Run, progress: Progress) -> None:
    if not run.accelerator.is_main_process:
        return
    saves, folder = plan_saves(run, progress), run.recipe.run.output
    run.callbacks.on_message(f"saves: {saves} in {folder}")
    run.warnings.add(disk_warnings(saves, folder))


def _divergence_hint(run: Run, progress: Progress) -> str:
    states = output.saved_states(run.recipe.run.output, run.recipe.run.name)
    sound = sound_states(states, progress.losses, progress.step)
    return divergence_hint(run.recipe, states, sound)


def _train_steps(run: Run, progress: Progress, stop: StopRequest) -> None:
    """Train until the last step, or until a stop is requested."""
    if progress.step >= run.steps:
        return
    settings = run.recipe.run
    run.optimization.network.train()  # transformers checkpoints gradients in training mode only
    losses: list[Tensor] = []
    clock = SaveClock(settings.save_every_minutes)
    started = time.perf_counter()
    for batch in _batches(run, progress):
        loss, grad_norm = train_batch(run, batch, progress)
        losses.append(loss)
        if grad_norm is None:
            continue  # the step needs more batches
        progress.step += 1
        progress.position += run.batches_per_step
        if run.optimization.average is not None:
            run.optimization.average.update()
        is_logged = progress.step % settings.log_every_steps == 0 or progress.step == run.steps
        norms = is_logged and _logs_norms(run, progress)
        info = step_info(run, progress.step, losses, grad_norm, started, norms=norms)
        progress.in_step = False
        progress.skipped_steps += not math.isfinite(info.grad_norm)
        losses = []
        progress.seconds += info.seconds
        progress.losses[info.step] = info.loss
        if is_logged:
            run.callbacks.on_step(info)
        _refresh(run, progress)
        requests = _requests(run, stop)
        stops, saves = agreed(run.accelerator, stop="stop" in requests, save=clock.is_due)
        if not stops:
            if _between_steps(run, progress, requests, save_state=saves):
                clock.restart()
            # during a save, a validation or a preview
            stops, _ = agreed(run.accelerator, stop="stop" in _requests(run, stop), save=False)
        if stops:
            break
        started = time.perf_counter()


def _refresh(run: Run, progress: Progress) -> None:
    """Fold the changes into the weights and take new frames, if that is due after this step."""
    if run.refresher is None or not run.refresher.is_due(progress.step, run.steps):
        return
    progress.in_step = True  # an error in between leaves layers of two kinds
    with stage(run.callbacks, "taking new frames") as progressed:
        run.refresher.refresh(progress.step, run.optimization.optimizer, progressed)
    run.model.injection.joined_factors.refresh()
    progress.in_step = False


def _requests(run: Run, stop: StopRequest) -> frozenset[Request]:
    """Return what a user wants after this step: by a callback of the main process, or by a signal."""
    stops: frozenset[Request] = frozenset(["stop"] if stop.requested else [])
    return stops | run.callbacks.requests()


def _batches(run: Run, progress: Progress) -> Iterable[Batch]:
    """Return the remaining batches of the run, shared among the processes."""
    stop = progress.position + (run.steps - progress.step) * run.batches_per_step
    workers = run.recipe.data.workers
    loader: DataLoader[Batch] = DataLoader(
        cast("Any", run.data.pictures),
        batch_sampler=PlannedBatches(run.data.plan, progress.position, stop),
        collate_fn=cast("Any", keep_batch),
        num_workers=workers,
        worker_init_fn=ignore_interrupts,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(0),  # workers need a seed but draw nothing
    )
    return cast("Iterable[Batch]", run.accelerator.prepare(loader))


def _logs_norms(run: Run, progress: Progress) -> bool:
    """Return whether to log the size of the change. The residual form has to move the frames for it."""
    is_cheap = run.recipe.model.form == "delta"
    return is_cheap or progress.step % RESIDUAL_NORM_STEPS == 0 or progress.step == run.steps


def _between_steps(run: Run, progress: Progress, requests: frozenset[Request], *, save_state: bool) -> bool:
    """Validate, save and draw a preview if they are due or requested; return whether a state was saved."""
    due = partial(is_due, run.recipe.run, step=progress.step, position=progress.position, span=run.span)
    is_last = progress.step == run.steps  # `_finish` validates and saves
    saves = (due("save") or "save" in requests) and not is_last
    if due("validate") and not is_last:
        _validate(run, progress)
    if saves:
        output.save_step(run, progress)
    elif save_state and not is_last:
        output.save_state(run, progress)
    if "save" in requests:
        run.callbacks.on_request_done("save")
    if due("preview") or "preview" in requests or (is_last and previews_at_end(run.recipe.run)):
        _preview(run, progress)
    if "preview" in requests:
        run.callbacks.on_request_done("preview")
    return saves or save_state


def _finish(run: Run, progress: Progress) -> None:
    if progress.step < run.steps:  # interrupted
        output.save_step(run, progress)
        return
    progress.validation_after = progress.validation_before if run.steps == 0 else _validate(run, progress)
    output.save_final(run, progress)


@contextmanager
def _evaluation(run: Run) -> Iterator[None]:
    """Use eval mode and the weights to save inside the block."""
    run.model.denoiser.eval()
    try:
        with run.finished_weights():
            yield
    finally:
        run.optimization.network.train()


def _validate(run: Run, progress: Progress) -> float | None:
    if not run.data.validation:
        return None
    settings = run.recipe.run
    with _evaluation(run), stage(run.callbacks, "validation") as progressed:
        loss = validation_loss(
            run.model.denoiser,
            run.data.validation,
            run.objective.prediction,
            times=settings.validation_times,
            batch=settings.batch,
            progress=progressed,
        )
    run.callbacks.on_validation(progress.step, loss)
    return loss


def _preview(run: Run, progress: Progress) -> None:
    """Draw a preview. If that fails, for example because memory runs out, warn and continue the run."""
    if not run.accelerator.is_main_process:
        return
    try:
        with _evaluation(run), torch.no_grad(), stage(run.callbacks, "drawing a preview"):
            run.callbacks.on_preview(progress.step, run.preview_model)
    except Exception as error:  # whatever a callback raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        run.warnings.add([f"no preview of step {progress.step}: {reason}"])
        if run.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def _report(run: Run, progress: Progress, *, interrupted: bool) -> TrainReport:
    recent = list(progress.losses.values())[-RECENT_STEPS:]
    warnings = list(run.warnings.entries)
    if progress.skipped_steps:
        warnings.append(
            f"{counted(progress.skipped_steps, 'step')} of {progress.step - progress.first_step} changed "
            "nothing: gradients overflowed in fp16, and the loss scale was halved each time"
        )
    return TrainReport(
        steps=progress.step,
        first_step=progress.first_step,
        seconds=progress.seconds,
        training_loss=sum(recent) / len(recent) if recent else None,
        validation_before=progress.validation_before,
        validation_after=progress.validation_after,
        files=tuple(file for file in progress.files if file.exists()),
        interrupted=interrupted,
        warnings=tuple(warnings),
    )
