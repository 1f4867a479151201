"""Stages of benchmarks/gpu.py that compare `spectune plan` with runs within limited memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import tomlkit
import torch

from benchmarks._gpu_machine import cuda_or_raise
from benchmarks._gpu_rows import NEEDS_CUDA, Emit, Values, guarded
from benchmarks._gpu_runs import Recorder
from benchmarks._gpu_settings import Settings
from spectune.checkpoints.open import open_checkpoint
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layers import build_catalogue
from spectune.training.loop import train
from spectune.training.memory.account import CONTEXT_BYTES, Memory, Setup
from spectune.training.memory.meter import MemoryMeter
from spectune.training.memory.search import described, ladder, recipe_text
from spectune.training.recipe.recipe import parse_recipe

STEPS = 3
SIZES_GB = (6, 8, 12, 16)
# Setups to try in addition to plan's own choice for each size: changes of `Setup`.
_LEAN: Mapping[str, Any] = {
    "parts": ("unet",),
    "gradient_checkpointing": True,
    "offload": ("text", "vae"),
}
CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "bf16": _LEAN,
    "int8": {**_LEAN, "form": "residual", "quantize": "int8"},
    "nf4": {**_LEAN, "form": "residual", "quantize": "nf4"},
    "streamed": {**_LEAN, "stream": True},
    "streamed nf4": {**_LEAN, "stream": True, "form": "residual", "quantize": "nf4"},
}
NAMES = (*(f"plan, {size} GB" for size in SIZES_GB), *CONFIGURATIONS)


def plan(settings: Settings, emit: Emit, argument: str) -> None:
    """Predict the memory of all setups, on the CPU, and write them for `run_within`."""
    with open_checkpoint(settings.base) as source:
        meter = MemoryMeter(infer_layout(source), build_catalogue(source))
    requested = Setup(rank=settings.rank, resolution_px=settings.pixels)
    runs: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        guarded(emit, name, lambda name=name: _planned(settings, meter, requested, name, runs))
        settings.memory.write_text(json.dumps(runs), encoding="utf-8")


def _planned(
    settings: Settings, meter: MemoryMeter, requested: Setup, name: str, runs: dict[str, dict[str, Any]]
) -> Values:
    """Return the prediction for a setup; add it to `runs` with the limit that it must fit."""
    if name in CONFIGURATIONS:
        setup = replace(requested, **CONFIGURATIONS[name])
        memory = meter.measure(setup)
        fitting = [size for size in SIZES_GB if memory.total <= size * 1e9]
        limit = fitting[0] if fitting else None
    else:
        limit = SIZES_GB[NAMES.index(name)]
        setup, memory = first_that_fits(meter, requested, round(limit * 1e9))
    known: Values = {
        "limit GB": limit or "none fits",
        "setup": described(setup),
        "predicted GB": memory.total / 1e9,
        "predicted tensors GB": memory.peak / 1e9,
    }
    same = next((other for other, run in runs.items() if run["setup"] == _as_text(setup)), None)
    if limit is not None:
        runs[name] = {"known": known, "setup": _as_text(setup), "limit": limit, "same": same}
        runs[name]["recipe"] = recipe_text(setup, str(settings.base))
    return known


def first_that_fits(meter: MemoryMeter, requested: Setup, limit: int) -> tuple[Setup, Memory]:
    """Return the setup that `spectune plan` finds, without its alternatives, which take time to measure."""
    for setup in ladder(requested):
        if meter.least(setup) <= limit:
            memory = meter.measure(setup)
            if memory.total <= limit:
                return setup, memory
    raise ValueError(f"nothing fits {limit / 1e9:g} GB")


def _as_text(setup: Setup) -> str:
    return json.dumps(asdict(setup))


def run_within(settings: Settings, emit: Emit, argument: str) -> None:
    """Train a few steps with a planned setup, with the memory of the card limited to its size."""
    runs: dict[str, dict[str, Any]] = json.loads(settings.memory.read_text(encoding="utf-8"))
    if argument not in runs:
        emit(argument, status="skipped", note="no size fits, or the stage plan failed")
        return
    run = runs[argument]
    if run["same"] is not None:
        emit(argument, run["known"], status="skipped", note=f"same setup as {run['same']}")
        return
    guarded(emit, argument, lambda: _trained_within(settings, argument, run), run["known"])


def _trained_within(settings: Settings, name: str, run: Mapping[str, Any]) -> Values:
    cuda = torch.cuda.is_available()
    if cuda:
        _limit_memory(run["limit"] * 1e9)
    recorder, recipe = Recorder(), parse_recipe(_recipe(settings, name, run["recipe"]))
    train(recipe, callbacks=[recorder], force=True)
    shutil.rmtree(recipe.run.output)  # a GB and more
    peaks = (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
    allocated, reserved = (peak() / 1e9 if cuda else NEEDS_CUDA for peak in peaks)
    return {
        "peak tensors GB": allocated,
        "peak reserved GB": reserved,
        "seconds of the last step": recorder.seconds[-1],
    }


def _limit_memory(size: float) -> None:
    """Leave torch the memory of a card with `size` bytes, without the CUDA context that plan assumes."""
    total = torch.cuda.get_device_properties(cuda_or_raise()).total_memory
    share = (size - CONTEXT_BYTES) / total
    if share > 1:
        raise ValueError(f"this card has {total / 1e9:.1f} GB only")
    torch.cuda.set_per_process_memory_fraction(share)


def _recipe(settings: Settings, name: str, text: str) -> dict[str, Any]:
    """Return plan's recipe with pictures and a length. At the rank of the principal, it need not split."""
    planned = tomlkit.parse(text).unwrap()
    if planned["model"]["rank"] == settings.rank:
        del planned["model"]["rank"]
        planned["model"]["principal"] = str(settings.principal)
    planned["data"]["folders"] = [str(settings.pictures)]
    files = {"name": "memory", "output": str(settings.work / f"memory, {name}"), "tensorboard": False}
    planned["run"] |= {**files, "steps": STEPS}
    return planned
