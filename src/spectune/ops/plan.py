"""Plan: which way of training fits a card, and the memory behind the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from spectune.adapters.detect import is_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.checkpoints.plain_weights import check_plain_weights
from spectune.errors import InputError, SpectuneError, did_you_mean
from spectune.files.source import WeightSource
from spectune.operation import operation
from spectune.ops.options.training import PlanOptions
from spectune.pairs.rules import check_whole_model
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

SIZES_PX, BATCHES = (512, 768, 1024), (1, 4)  # of the table of activations
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Activations:
    """Bytes that a step holds at one size in addition to the model."""

    resolution_px: int
    batch: int
    plain: int
    checkpointing: int


@dataclass(frozen=True)
class PlanReport:
    """The best way of training that fits, and what it was chosen from."""

    found: Plan
    weights: Mapping[str, Mapping[str, int]]  # network -> precision -> bytes
    optimizers: Mapping[str, int | None]  # bytes of state; None where the package is not installed
    activations: tuple[Activations, ...]
    recipe: str  # TOML


@operation(PlanOptions)
def plan(options: PlanOptions) -> PlanReport:
    """Find the best way of training that fits a card.

    Raises InputError if nothing fits.
    """
    nbytes = parse_bytes(options.vram) if isinstance(options.vram, str) else options.vram
    notify = options.notify or _ignore
    requested = Setup(
        rank=options.rank,
        parts=parse_parts(options.parts),
        resolution_px=options.resolution,
        batch=options.batch,
        optimizer=_known_optimizer(options.optimizer),
        ema=options.ema,
    )
    with open_checkpoint(options.model) as source:
        _check_original(source)
        layout = infer_layout(source)
        meter = MemoryMeter(layout, build_catalogue(source))
    _check_resolution(layout, options.resolution)
    found = plan_training(meter, requested, nbytes, notify)
    best = found.best.setup
    return PlanReport(
        found=found,
        weights=_weights_by_precision(meter, best),
        optimizers=_optimizer_states(meter, best),
        activations=_activations(meter, best, notify) if options.activations else (),
        recipe=recipe_text(best, str(options.model)),
    )


def _ignore(message: str) -> None:
    """Drop a message that nobody listens to."""


def parse_parts(words: str) -> tuple[PartName, ...]:
    """Parts of the model by name, in the model's order; raises InputError for an unknown one."""
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    for word in wanted:
        if word not in ALL_PARTS:
            raise InputError(
                f"unknown part {word!r}{did_you_mean(word, ALL_PARTS)}",
                hint=f"some of {', '.join(ALL_PARTS)}",
            )
    if not wanted:
        raise InputError("no part to train", hint=f"some of {', '.join(ALL_PARTS)}")
    return tuple(part for part in ALL_PARTS if part in wanted)


def _known_optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        raise InputError(
            f"unknown optimizer {name!r}{did_you_mean(name, OPTIMIZERS)}",
            hint=f"one of {', '.join(OPTIMIZERS)}",
        )
    return name


def _check_original(source: WeightSource) -> None:
    if is_adapter(source):
        raise InputError(
            f"{source.label} is an adapter: expected a checkpoint",
            hint="pass the model that it was made from",
        )
    check_whole_model(
        source, hint='plan with the original; it takes as much, and form = "residual" is tried too'
    )
    check_plain_weights(source)


def _check_resolution(layout: Layout, resolution_px: int) -> None:
    if layout.vae is None:
        raise InputError(
            "the checkpoint has no VAE", hint="add one with `spectune slice MODEL:unet MODEL:te OTHER:vae`"
        )
    step = 2 ** (len(layout.vae.channels) - 1) * 2 ** (len(layout.unet.channels) - 1)
    if resolution_px % step:
        raise InputError(
            f"`resolution` {resolution_px}: this model needs a multiple of {step} pixels",
            hint=f"{max(resolution_px // step, 1) * step} is one",
        )


def _optimizer_states(meter: MemoryMeter, setup: Setup) -> dict[str, int | None]:
    """Bytes of state for each optimiser; None where its package is not installed."""
    found: dict[str, int | None] = {}
    for name in OPTIMIZERS:
        try:
            found[name] = meter.measure(replace(setup, optimizer=name)).optimizer
        except SpectuneError:
            found[name] = None
    return found


def _weights_by_precision(meter: MemoryMeter, setup: Setup) -> dict[str, dict[str, int]]:
    """Bytes of each frozen network as fp32, bf16 and quantised from bf16."""
    plain = meter.inventory(replace(setup, precision="bf16")).weights
    wide = meter.inventory(replace(setup, precision="fp32")).weights["none"]
    columns = {"fp32": wide, "bf16": plain["none"], **{kind: plain[kind] for kind in QUANTIZED}}
    return {
        "UNet": {name: weights.unet for name, weights in columns.items()},
        "text encoders": {name: weights.encoders for name, weights in columns.items()},
        "VAE": {"fp32": wide.vae},  # whatever the precision: it overflows in 16 bits
    }


def _activations(meter: MemoryMeter, setup: Setup, notify: Notify) -> tuple[Activations, ...]:
    found: list[Activations] = []
    for size in SIZES_PX:
        for batch in BATCHES:
            notify(f"measuring {size} px in batches of {batch}")
            held = [
                meter.measure(
                    replace(setup, resolution_px=size, batch=batch, gradient_checkpointing=checkpointing)
                )
                for checkpointing in (False, True)
            ]
            plain, slow = (memory.kept + memory.working for memory in held)
            found.append(Activations(size, batch, plain, slow))
    return tuple(found)
