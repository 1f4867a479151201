"""Find training settings that fit into the memory of a GPU, and report the memory they need."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError, SpectuneError, did_you_mean
from spectune.model.device import memory_to_plan
from spectune.model.network import no_vae
from spectune.operation import operation
from spectune.ops.options.training import PlanOptions
from spectune.pairs.sizes import parse_bytes
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.layout import Layout
from spectune.training.memory.account import Setup
from spectune.training.memory.meter import MemoryMeter
from spectune.training.memory.search import QUANTIZED, Plan, recipe_text
from spectune.training.memory.search import plan as plan_training
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.recipe.sections.model import ALL_PARTS, PartName
from spectune.training.trainable_model import check_trainable

SIZES_PX, BATCHES = (512, 768, 1024), (1, 4)  # rows of the table of activations
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Activations:
    """Bytes of activations of one step at one picture size, in addition to the model."""

    resolution_px: int
    batch: int
    plain: int
    checkpointing: int


@dataclass(frozen=True)
class PlanReport:
    """The best settings that fit, the alternatives, and the memory of each."""

    found: Plan
    weights: Mapping[str, Mapping[str, int]]  # network -> precision -> bytes
    optimizers: Mapping[str, int | None]  # bytes of state; None if the package is not installed
    activations: tuple[Activations, ...]
    recipe: str  # TOML


def _vram(size: str | int | None) -> int:
    """Return `size` in bytes, by default the memory of this machine's card without the desktop's share."""
    found = memory_to_plan() if size is None else parse_memory(size)
    if found is None:
        raise InputError("`vram` is missing: this machine has no CUDA card", hint="an example: 12GB")
    return found


def parse_memory(size: str | int) -> int:
    """Return the bytes of the memory of a card: 12GB, 12GiB or 12."""
    if isinstance(size, int):
        return size
    # A bare 12 means 12 GB: nobody plans for 12 bytes.
    return parse_bytes(f"{size}GB" if re.fullmatch(r"\s*\d{1,3}(\.\d+)?\s*", size) else size)


@operation(PlanOptions)
def plan(options: PlanOptions) -> PlanReport:
    """Find the best training settings that fit into the memory of a GPU.

    Raises InputError if no settings fit.
    """
    nbytes = _vram(options.vram)
    requested = Setup(
        rank="full" if options.full else options.rank,
        parts=parse_parts(options.parts),
        resolution_px=options.resolution,
        batch=options.batch,
        optimizer=_known_optimizer(options.optimizer),
        ema=options.ema,
    )
    if options.full:  # steps in float32 copies of tensors, or with the optimizer's own stochastic rounding
        kind = OPTIMIZERS[requested.optimizer]
        requested = replace(requested, step_in_backward=kind.tensorwise, trained_precision="bf16")
        if not (kind.tensorwise or kind.rounds_stochastically):
            requested = replace(requested, precision="fp32", trained_precision="fp32")
    with open_checkpoint(options.model) as source:
        check_trainable(
            source,
            hint='pass the original model; form = "residual" is tried as well and needs as much memory',
        )
        layout = infer_layout(source)
        meter = MemoryMeter(layout, build_catalogue(source))
    _check_resolution(layout, options.resolution)
    found = plan_training(meter, requested, nbytes, options.tell)
    best = found.best.setup
    return PlanReport(
        found=found,
        weights=_weights_by_precision(meter, best),
        optimizers=_optimizer_states(meter, best),
        activations=_activations(meter, best, options.tell) if options.activations else (),
        recipe=recipe_text(best, str(options.model)),
    )


def parse_parts(words: str) -> tuple[PartName, ...]:
    """Return the named parts in the order of the model. Raises InputError for an unknown name."""
    names = [word.strip() for word in words.split(",") if word.strip()]
    for name in names:
        if name not in ALL_PARTS:
            raise InputError(
                f"unknown part {name!r} in `parts`{did_you_mean(name, ALL_PARTS)}",
                hint=f"the parts are {', '.join(ALL_PARTS)}",
            )
    if not names:
        raise InputError(
            "`parts` is empty: expected at least one", hint=f"the parts are {', '.join(ALL_PARTS)}"
        )
    return tuple(part for part in ALL_PARTS if part in names)


def _known_optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        raise InputError(
            f"unknown optimizer {name!r}{did_you_mean(name, OPTIMIZERS)}",
            hint=f"choose one of {', '.join(OPTIMIZERS)}",
        )
    return name


def _check_resolution(layout: Layout, resolution_px: int) -> None:
    if layout.vae is None:
        raise no_vae()
    if resolution_px % (step := layout.size_step):
        raise InputError(
            f"`resolution` is {resolution_px}: this model needs a multiple of {step} pixels",
            hint=f"for example {max(resolution_px // step, 1) * step}",
        )


def _optimizer_states(meter: MemoryMeter, setup: Setup) -> dict[str, int | None]:
    """Return the bytes of state of each optimizer, or None if its package is not installed."""
    states: dict[str, int | None] = {}
    for name in OPTIMIZERS:
        try:
            states[name] = meter.measure(replace(setup, optimizer=name)).optimizer
        except SpectuneError:
            states[name] = None
    return states


def _weights_by_precision(meter: MemoryMeter, setup: Setup) -> dict[str, dict[str, int]]:
    """Return the bytes of each frozen network in fp32, in bf16 and quantized from bf16."""
    plain = meter.inventory(replace(setup, precision="bf16")).weights
    wide = meter.inventory(replace(setup, precision="fp32")).weights["none"]
    columns = {"fp32": wide, "bf16": plain["none"], **{kind: plain[kind] for kind in QUANTIZED}}
    return {
        "UNet": {name: weights.unet for name, weights in columns.items()},
        "text encoders": {name: weights.encoders for name, weights in columns.items()},
        "VAE": {"fp32": wide.vae},  # always fp32: it overflows in 16 bits
    }


def _activations(meter: MemoryMeter, setup: Setup, notify: Notify) -> tuple[Activations, ...]:
    rows: list[Activations] = []
    for size in SIZES_PX:
        for batch in BATCHES:
            notify(f"measuring {size} px, batch size {batch}")
            memories = [
                meter.measure(
                    replace(setup, resolution_px=size, batch=batch, gradient_checkpointing=checkpointing)
                )
                for checkpointing in (False, True)
            ]
            plain, checkpointed = (memory.kept + memory.working for memory in memories)
            rows.append(Activations(size, batch, plain, checkpointed))
    return tuple(rows)
