"""The keys of a recipe whose defaults depend on the base and on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.files.provenance import Provenance
from spectune.files.source import WeightSource, declared_prediction, declared_zero_snr
from spectune.model.device import drawing_dtype
from spectune.model.vae.convention import (
    VaeConvention,
    merge_conventions,
    own_convention,
    resolve_convention,
)
from spectune.model.vae.vae_file import check_latents, open_vae
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layout import SDXL, Layout
from spectune.training.recipe.recipe import Recipe, parse_recipe
from spectune.training.recipe.sections.data import DEFAULT_STEP_PX, DataSection
from spectune.training.recipe.sections.model import VaeSection
from spectune.training.recipe.sections.objective import ObjectiveSection

Keys = dict[str, Any]

SAVE_MINUTES = 30.0  # the most work that a crash of a full-size run may lose


def with_defaults(recipe: Recipe, device: torch.device | str) -> Recipe:
    """Return the recipe with missing keys filled in from the base and the device.

    Raises:
        InputError: The recipe does not fit the base.
    """
    data = recipe.model_dump()
    with open_checkpoint(recipe.model.checkpoint) as base:
        objective = _objective(recipe.objective, base, start_provenance(recipe.model.start))
        data["objective"] |= objective
        if _missing(recipe):
            layout = run_layout(base, recipe.vae)
            is_large = is_full_size(layout)
            data["run"] |= _run(recipe, torch.device(device), is_large=is_large)
            data["data"]["bucket"] |= bucket_defaults(recipe.data, layout)
        return parse_recipe(data, label=f"recipe, trained as {objective['kind']} for {base.label}")


def run_layout(base: WeightSource, section: VaeSection) -> Layout:
    """Return the layout of a base with the autoencoder of [vae], from the headers of the files.

    Raises:
        InputError: The file is no autoencoder, or its latents do not fit the UNet or the name in [vae].
    """
    layout = infer_layout(base)
    if section.path is None:
        return layout
    channels = layout.unet.in_channels
    default = merge_conventions(base.provenance, default=own_convention(layout.vae, channels))
    convention = section_convention(section, default)
    with open_vae(section.path) as file:
        vae = file.layout(convention, channels)
        check_latents(vae, convention, channels, file.label)
    return replace(layout, vae=vae)


def section_convention(section: VaeSection, default: VaeConvention) -> VaeConvention:
    """Return the convention of [vae]; `default` is that of the checkpoint."""
    return resolve_convention(
        section.path,
        name=section.name,
        scale=section.scale,
        shift=section.shift,
        padding=section.padding,
        default=default,
    )


def is_full_size(layout: Layout) -> bool:
    """Return whether a base has the size of SDXL."""
    return layout.unet.channels[0] >= SDXL.unet.channels[0]


def described_defaults(requested: Recipe, complete: Recipe) -> str:
    """Return the settings that `with_defaults` chose for a large base; empty for a small one."""
    chosen: list[str] = []
    if requested.run.precision is None and complete.run.precision != "fp32" and not complete.model.is_full:
        chosen.append(f"run.precision = {complete.run.precision}")
    if requested.run.gradient_checkpointing is None and complete.run.gradient_checkpointing:
        chosen.append("run.gradient_checkpointing = true")
    if requested.run.save_every_minutes is None and complete.run.save_every_minutes:
        chosen.append(f"run.save_every_minutes = {complete.run.save_every_minutes:g}")
    return ", ".join(chosen)


def _missing(recipe: Recipe) -> bool:
    run = recipe.run
    return None in (
        run.precision,
        run.gradient_checkpointing,
        run.save_every_minutes,
        recipe.data.bucket.enabled,
        recipe.data.bucket.step_px,
    )


def start_provenance(start: Path | None) -> Provenance:
    """Return what the tuned adapter in `model.start` declares; empty without one."""
    if start is None:
        return Provenance()
    with open_checkpoint(start) as file:
        return file.provenance


def _objective(section: ObjectiveSection, base: WeightSource, start: Provenance) -> Keys:
    declared = start.prediction or declared_prediction(base) or "eps"
    kind = section.kind or declared
    if section.converts and (kind != "flow" or declared != "eps" or declared_zero_snr(base)):
        raise InputError(
            "objective.start, teacher and bridge_steps convert an EPS base to a flow model: "
            f"{base.label} predicts {declared} and objective.kind is {kind}",
            hint='remove these keys, or use an EPS base and set objective.kind = "flow"',
        )
    shift, zero = section.flow_shift, section.zero_terminal_snr
    if kind == "flow" and shift is None:
        shift = start.flow_shift or base.provenance.flow_shift or 1.0
    if zero is None and start.noise_schedule is not None:
        zero = kind != "flow" and start.noise_schedule == "zero_terminal_snr"
    if zero is None:
        zero = kind != "flow" and declared_zero_snr(base)
    return {"kind": kind, "flow_shift": shift, "zero_terminal_snr": zero}


def _run(recipe: Recipe, device: torch.device, *, is_large: bool) -> Keys:
    precision, checkpointing = recipe.run.precision, recipe.run.gradient_checkpointing
    minutes = recipe.run.save_every_minutes
    if precision is None:
        precision = recipe.run.trained_precision if recipe.model.is_full else "fp32"
        if is_large and not recipe.model.is_full:
            has_bf16 = device.type != "cuda" or drawing_dtype(str(device)) == torch.bfloat16
            precision = "bf16" if has_bf16 else "fp16"
    return {
        "precision": precision,
        "gradient_checkpointing": is_large if checkpointing is None else checkpointing,
        "save_every_minutes": (SAVE_MINUTES if is_large else 0.0) if minutes is None else minutes,
    }


def bucket_defaults(data: DataSection, layout: Layout) -> Keys:
    """Return the keys of `data.bucket` that depend on the base."""
    bucket, smallest = data.bucket, data.resolutions[0]
    step = bucket.step_px
    if step is None:
        # at lower resolutions, steps of 64 px would crop away more
        allowed = layout.size_step
        step = max(allowed, min(DEFAULT_STEP_PX, smallest // 16) // allowed * allowed)
    enabled = smallest >= step if bucket.enabled is None else bucket.enabled
    return {"enabled": enabled, "step_px": step}
