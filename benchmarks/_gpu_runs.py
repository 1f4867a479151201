"""Stages of benchmarks/gpu.py that train and sample: through the trainer, and as commands."""

from __future__ import annotations

import io
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, get_args

import tomlkit
import torch

from benchmarks._gpu_machine import cuda_or_raise
from benchmarks._gpu_rows import NEEDS_CUDA, Emit, Values, guarded
from benchmarks._gpu_settings import Settings
from spectune.cli.app import run as run_command
from spectune.training.callbacks import Callbacks, StepInfo
from spectune.training.loop import train
from spectune.training.recipe.recipe import parse_recipe
from spectune.training.recipe.sections.run import Precision

SYNCHRONIZED = ("adamw", "prodigy_plus_schedule_free")
AUTOCAST = "ACCELERATE_MIXED_PRECISION"


class Recorder(Callbacks):
    """Keeps the losses and the times of all steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_step(self, info: StepInfo) -> None:
        self.losses.append(info.loss)
        self.seconds.append(info.seconds)


# ---------------------------------------------------------------- through the trainer


def measure_losses(settings: Settings, emit: Emit, argument: str) -> None:
    """Train the embedded base in float32 on a device; compare the losses with those of the CPU."""

    def losses() -> Values:
        if argument == "cuda":
            cuda_or_raise()
        recipe = settings.demo_recipe(f"losses-{argument}", steps=5, precision="fp32", device=argument)
        recorder = Recorder()
        train(parse_recipe(recipe), callbacks=[recorder], force=True)
        file = settings.work / "losses.json"
        if argument == "cpu":
            file.write_text(json.dumps(recorder.losses), encoding="utf-8")
        values = {f"step {index}": loss for index, loss in enumerate(recorder.losses, start=1)}
        return {**values, "largest relative difference from the CPU": _difference(recorder.losses, file)}

    guarded(emit, argument, losses)


def _difference(losses: Sequence[float], file: Path) -> float | str:
    if not file.exists():
        return "the CPU's losses are missing"
    expected: list[float] = json.loads(file.read_text(encoding="utf-8"))
    return max(abs(loss - other) / abs(other) for loss, other in zip(losses, expected, strict=True))


class Synchronizations(Callbacks):
    """Counts the synchronizations of two steps, by torch's warnings."""

    FIRST, LAST = 2, 4  # counted from the end of the first to the end of the last

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self._caught, self._before = caught, 0
        self.places: Counter[str] = Counter()

    def on_step(self, info: StepInfo) -> None:
        if info.step == self.FIRST - 1:
            set_sync_debug("warn")  # warns itself
        elif info.step == self.FIRST:
            self._before = len(self._caught)
        elif info.step == self.LAST:
            set_sync_debug("default")
            found = [w for w in self._caught[self._before :] if "synchronizing CUDA" in str(w.message)]
            self.places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found)

    @property
    def per_step(self) -> float:
        return self.places.total() / (self.LAST - self.FIRST)


def set_sync_debug(mode: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def measure_synchronizations(settings: Settings, emit: Emit, argument: str) -> None:
    """Count the synchronizations of a step of the trainer with two optimizers, on the embedded base."""

    def counted(optimizer: str) -> Values:
        recipe = settings.demo_recipe(f"synchronizations-{optimizer}", steps=Synchronizations.LAST)
        recipe["optimizer"] = {"name": optimizer}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            counter = Synchronizations(caught)
            try:
                train(parse_recipe(recipe), callbacks=[counter], force=True)
            finally:
                set_sync_debug("default")
        cuda_or_raise()
        places = ", ".join(f"{place} {count}x" for place, count in counter.places.most_common(8))
        return {"per step": counter.per_step, "places in two steps": places}

    for optimizer in SYNCHRONIZED:
        guarded(emit, optimizer, partial(counted, optimizer))


def measure_fp16(settings: Settings, emit: Emit, argument: str) -> None:
    """Train in fp16, if recipes know that precision."""
    if "fp16" not in get_args(Precision):
        emit('run.precision = "fp16"', status="skipped", note="this version has no such precision")
        return

    def trained() -> Values:
        cuda_or_raise()
        recorder = Recorder()
        train(
            parse_recipe(settings.demo_recipe("fp16", steps=5, precision="fp16")),
            callbacks=[recorder],
            force=True,
        )
        return {f"loss of step {index}": loss for index, loss in enumerate(recorder.losses, start=1)}

    guarded(emit, 'run.precision = "fp16"', trained)


# ---------------------------------------------------------------- as commands


class CommandFailed(Exception):
    """A command ended with an exit code other than 0."""


def command(*words: object) -> str:
    """Run a command of spectune in this process, and return what it prints on stdout."""
    output, messages = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(messages):
        code = run_command([str(word) for word in words])
    if code != 0:
        line = " ".join(map(str, words))
        raise CommandFailed(f"exit code {code} of: spectune {line}\n{messages.getvalue()}")
    return output.getvalue()


def _write_recipe(path: Path, recipe: Mapping[str, Any]) -> Path:
    path.write_text(tomlkit.dumps(recipe), encoding="utf-8")
    return path


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _peak() -> float | str:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else NEEDS_CUDA


def train_command(settings: Settings, emit: Emit, argument: str) -> None:
    """Run `spectune train` with a save and a preview. `argument` is `start`, or `resume` for more steps."""
    steps = settings.steps + (argument == "resume")

    def trained() -> Values:
        first = settings.steps
        run = {"steps": steps, "save_every_steps": first // 2, "preview_every_steps": first}
        recipe = settings.recipe("trained", run=run, optimizer={"name": "prodigy_plus_schedule_free"})
        path = _write_recipe(settings.work / "train.toml", recipe)
        began = time.perf_counter()
        report = json.loads(command("train", path, "--json"))
        done = report["steps"] - report["first_step"]
        return {
            "seconds": time.perf_counter() - began,
            "steps": f"{report['first_step']} to {report['steps']}",
            "s/step": report["seconds"] / max(done, 1),
            "files": len(report["files"]),
            "previews": len(list((settings.work / "trained" / "previews").glob("*.png"))),
            "loss": report["training_loss"],
            "warnings": len(report["warnings"]),
            "peak GB": _peak(),
        }

    guarded(emit, argument, trained)


def sample_command(settings: Settings, emit: Emit, argument: str) -> None:
    """Run `spectune sample` on the checkpoint."""

    def drawn() -> Values:
        folder, steps = settings.work / "drawn", 2 if settings.tiny else 20
        began = time.perf_counter()
        where = ("--size", settings.pixels, "--steps", steps, "--batch", 1, "-o", folder)
        command("sample", settings.base, "-c", "a colored pattern", *where)
        return {
            "seconds": time.perf_counter() - began,
            "steps": steps,
            "pictures": len(list(folder.glob("*.png"))),
            "peak GB": _peak(),
        }

    guarded(emit, f"{settings.pixels} px", drawn)


def train_with_autocast(settings: Settings, emit: Emit, argument: str) -> None:
    """Run `spectune train` on the embedded base, with accelerate's autocast in the environment."""

    def trained() -> Values:
        recipe = settings.demo_recipe(f"autocast-{argument}", steps=2)
        path = _write_recipe(settings.work / f"autocast-{argument}.toml", recipe)
        with _environment(AUTOCAST, argument):
            report = json.loads(command("train", path, "--json"))
        return {"steps": report["steps"], "loss": report["training_loss"]}

    guarded(emit, f"{AUTOCAST}={argument}", trained)
