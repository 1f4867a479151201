"""The files of a run in its output folder: their names, and when they are written or removed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.writer import save_tuned
from spectune.core.delta import Delta
from spectune.errors import InputError, counted, some_of
from spectune.files.provenance import NoiseSchedule, Role
from spectune.files.rename import remove_leftovers_of, remove_whole
from spectune.model.prediction import Flow
from spectune.training import state
from spectune.training.callbacks import stage
from spectune.training.recipe.recipe import Recipe
from spectune.training.resume.divergence import NotFinite
from spectune.training.run import Progress, Run

# ---------------------------------------------------------------- names


def state_folder(output: Path, name: str, step: int) -> Path:
    """Return the path of the state after `step` steps."""
    return output / f"{name}-step{step:08d}.state"


def step_of(path: Path) -> int:
    """Return the step in the name of a state or of a step adapter."""
    match = re.search(r"-step(\d{8})\.", path.name)
    assert match is not None
    return int(match[1])


def adapter_file(output: Path, name: str, step: int | None = None) -> Path:
    """Return the path of the adapter after `step` steps, or of the final adapter if `step` is None."""
    return output / (f"{name}.safetensors" if step is None else f"{name}-step{step:08d}.safetensors")


def saved_states(output: Path, name: str) -> list[Path]:
    """Return the complete states of the run `name`, oldest first."""
    return [path for path in _numbered(output, name, ".state") if (path / state.STATE).is_file()]


def step_files(output: Path, name: str) -> list[Path]:
    """Return the adapters that the run `name` saved before its end, oldest first."""
    return _numbered(output, name, ".safetensors")


def results(output: Path, name: str) -> list[Path]:
    """Return all states and adapters of the run `name`, the final adapter last."""
    paths = [*_numbered(output, name, ".state"), *step_files(output, name)]
    final = adapter_file(output, name)
    return [*paths, final] if final.exists() else paths


def _numbered(output: Path, name: str, ending: str) -> list[Path]:
    if not output.is_dir():
        return []
    pattern = re.compile(rf"{re.escape(name)}-step(\d{{8}}){re.escape(ending)}")
    found = [(int(match[1]), path) for path in output.iterdir() if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def keep_newest(paths: Sequence[Path], count: int) -> list[str]:
    """Remove all but the last `count` of the paths, which are sorted from old to new; return warnings.

    Windows refuses to remove a file that another program has open. The next save tries again.
    """
    warnings: list[str] = []
    for path in paths[:-count]:
        try:
            remove_whole(path)
        except OSError as error:
            warnings.append(f"cannot remove the old save {path.name}: {error.strerror}")
    return warnings


# ---------------------------------------------------------------- before the run


@dataclass(frozen=True)
class Claim:
    """The decision about earlier results in the output folder."""

    states: tuple[Path, ...] = ()  # to resume from the newest complete one, oldest first
    replaced: tuple[Path, ...] = ()  # results to remove before the run


def restore_leftovers(recipe: Recipe) -> None:
    """Restore what a killed process was replacing, and remove its temporary files."""
    remove_leftovers_of(recipe.run.output, rf"{re.escape(recipe.run.name)}[.-].*")


def claim_output(recipe: Recipe, *, force: bool) -> Claim:
    """Decide whether to resume from earlier results or to replace them. Change no file.

    Raises:
        InputError: There are results of this run name that can be neither resumed nor replaced, or one of
            them is an input of this run.
    """
    output, name = recipe.run.output, recipe.run.name
    existing = results(output, name)
    _check_inputs_stay(recipe, existing)
    states = saved_states(output, name)
    if states and recipe.run.resume:
        return Claim(states=tuple(states))
    if existing and not force:
        raise InputError(
            f"{output} already holds {counted(len(existing), 'result')} of a run named {name}, such as "
            f"{existing[-1].name}",
            hint="set another run.name or run.output, or set `force` to replace them",
        )
    return Claim(replaced=tuple(existing))


def _check_inputs_stay(recipe: Recipe, existing: Sequence[Path]) -> None:
    for key in ("base", "residual", "principal"):
        path: Path | None = getattr(recipe.model, key)
        if path is None or not path.exists():
            continue
        resolved = path.resolve()
        for result in existing:
            if result.resolve() in (resolved, *resolved.parents):
                raise InputError(
                    f"model.{key} is {path}, but this run would overwrite it with its result {result.name}",
                    hint="set another run.name or run.output",
                )


def prepare_output(recipe: Recipe, claim: Claim) -> None:
    """Remove the results to replace and create the output folder."""
    for path in claim.replaced:
        remove_whole(path)
    recipe.run.output.mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------- during the run


def save_step(run: Run, progress: Progress) -> None:
    """Save the adapter, and the state of this step unless it exists."""
    settings = run.recipe.run
    _check_finite(run, progress)
    if not has_saved(run, progress):
        save_state(run, progress)  # first: an adapter without a state would stop the next run
    _save_adapter(run, progress, adapter_file(settings.output, settings.name, progress.step))
    if run.accelerator.is_main_process and settings.keep_last_adapters is not None:
        adapters = step_files(settings.output, settings.name)
        run.warnings.add(keep_newest(adapters, settings.keep_last_adapters))


def save_final(run: Run, progress: Progress) -> None:
    """Save the final adapter, and the state of the last step unless it exists."""
    settings = run.recipe.run
    _check_finite(run, progress)
    if not has_saved(run, progress):
        save_state(run, progress)
    _save_adapter(run, progress, adapter_file(settings.output, settings.name))


def has_saved(run: Run, progress: Progress) -> bool:
    """Return whether the state of this step was saved by this run, or is the one that it resumed from."""
    folder = state_folder(run.recipe.run.output, run.recipe.run.name, progress.step)
    is_resumed = progress.step == progress.first_step and folder.exists()
    return is_resumed or folder in progress.files


def save_state(run: Run, progress: Progress) -> None:
    """Save the state of this step and remove old states."""
    if not run.accelerator.is_main_process:
        return
    optimization, settings = run.optimization, run.recipe.run
    folder = state_folder(settings.output, settings.name, progress.step)
    with stage(run.callbacks, "saving the state"):
        state.save_state(
            folder,
            run.state_header(progress),
            optimization.parameters,
            optimization.optimizer,
            frames=run.frames(),
            extras=run.state_extras(),
        )
    progress.files.append(folder)
    run.callbacks.on_state(progress.step, folder)
    states = saved_states(settings.output, settings.name)
    run.warnings.add(keep_newest(states, settings.keep_last))


def _check_finite(run: Run, progress: Progress) -> None:
    whole = run.model.trainable.whole
    with run.finished_weights():
        _check_deltas(run.model.injection.deltas(), progress.step)
        if whole is not None:
            _check_whole(whole.parameters, progress.step)


def _save_adapter(run: Run, progress: Progress, path: Path) -> None:
    if not run.accelerator.is_main_process:
        return
    provenance = replace(
        run.model.trainable.provenance,
        role=Role.TUNED,
        prediction=run.objective.prediction.name,
        flow_shift=_flow_shift(run),
        noise_schedule=_noise_schedule(run),
    )
    with run.finished_weights(), stage(run.callbacks, "saving the adapter"):
        # a sum of changes in several frames is saved as complete tensors
        deltas = run.model.injection.deltas() if run.refresher is None else {}
        tuned = TunedAdapter(layers=deltas, metadata={}, label=path.name, replaced=run.complete_tensors)
        save_tuned(path, tuned, provenance, force=True)
    progress.files.append(path)
    run.callbacks.on_save(progress.step, path)


def _flow_shift(run: Run) -> float | None:
    """Return the flow shift for sampling; a shift by resolution becomes its value at `resolution_px`."""
    prediction = run.objective.prediction
    if not isinstance(prediction, Flow):
        return None
    return prediction.shift_at(run.recipe.data.resolution_px**2)


def _noise_schedule(run: Run) -> NoiseSchedule | None:
    if isinstance(run.objective.prediction, Flow):
        return None
    return "zero_terminal_snr" if run.recipe.objective.zero_terminal_snr else "sdxl"


def _check_whole(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    broken = [name for name, tensor in parameters.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise NotFinite(
            f"after step {step}, {counted(len(broken), 'trained tensor')} are not finite: {some_of(broken)}; "
            "the file was not saved",
        )


def _check_deltas(deltas: Mapping[str, Delta], step: int) -> None:
    broken = [
        name
        for name, delta in deltas.items()
        if not bool(torch.isfinite(delta.down).all() and torch.isfinite(delta.up).all())
    ]
    if broken:
        raise NotFinite(
            f"after step {step}, the trained changes of {counted(len(broken), 'layer')} are not finite: "
            f"{some_of(broken)}; the adapter was not saved",
        )
