"""`spectune plan`: which way of training fits a card, and the memory table behind the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from spectune.checkpoints.open import open_checkpoint
from spectune.checkpoints.plain_weights import check_plain_weights
from spectune.cli.console import megabytes, print_json, say, table
from spectune.errors import InputError, SpectuneError, did_you_mean
from spectune.files.provenance import Role
from spectune.files.source import WeightSource
from spectune.ops.inspect import is_adapter
from spectune.pairs.sizes import parse_bytes
from spectune.sdxl.inference import infer_layout
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.layout import Layout
from spectune.training.memory.account import CONTEXT_BYTES, FRAGMENTED_SHARE, Memory, MemoryMeter, Setup
from spectune.training.memory.search import QUANTISED, Candidate, Plan, described, recipe_text
from spectune.training.memory.search import plan as plan_training
from spectune.training.optim import OPTIMIZERS
from spectune.training.recipe.sections import ALL_PARTS, PartName

SIZES_PX, BATCHES = (512, 768, 1024), (1, 4)  # of the table of activations


@dataclass(frozen=True)
class Activations:
    """What a step holds beside the model at one size, in bytes."""

    resolution_px: int
    batch: int
    plain: int
    checkpointing: int


def plan(
    model: Path,
    vram: str,
    *,
    rank: int,
    parts: str,
    resolution: int,
    batch: int,
    optimizer: str,
    ema: bool,
    activations: bool,
    as_json: bool,
) -> None:
    """Tables on stderr and the keys of a recipe on stdout, or everything as JSON.

    Raises InputError when nothing fits.
    """
    nbytes = parse_bytes(vram)
    wish = Setup(
        rank=rank,
        parts=parse_parts(parts),
        resolution_px=resolution,
        batch=batch,
        optimizer=_known_optimizer(optimizer),
        ema=ema,
    )
    with open_checkpoint(model) as source:
        _check_original(source)
        layout = infer_layout(source)
        meter = MemoryMeter(layout, build_catalogue(source))
    _check_resolution(layout, resolution)
    found = plan_training(meter, wish, nbytes, say)
    best = found.best.setup
    states = _optimizer_states(meter, best)
    weights = _weights_by_precision(meter, best)
    sizes = _activations(meter, best) if activations else ()
    recipe = recipe_text(best, str(model))
    if as_json:
        print_json(_as_json(found, states, weights, sizes, recipe))
        return
    _print_weights(weights)
    _print_candidates(found)
    _print_memory(found.memory)
    _print_optimizers(states, best.optimizer)
    if sizes:
        _print_activations(sizes)
    _print_notes(found.memory)
    print(recipe)


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
            f"unknown optimiser {name!r}{did_you_mean(name, OPTIMIZERS)}",
            hint=f"one of {', '.join(OPTIMIZERS)}",
        )
    return name


def _check_original(source: WeightSource) -> None:
    if is_adapter(source):
        raise InputError(
            f"{source.label} is an adapter: expected a checkpoint",
            hint="pass the model that it was made from",
        )
    if source.provenance.role is Role.RESIDUAL:
        raise InputError(
            f"{source.label} is a residual: expected the original checkpoint",
            hint='plan with the original; it takes as much, and form = "residual" is tried too',
        )
    check_plain_weights(source)


def _check_resolution(layout: Layout, resolution_px: int) -> None:
    if layout.vae is None:
        raise InputError("the checkpoint has no VAE", hint="merge one into the file first")
    step = 2 ** (len(layout.vae.channels) - 1) * 2 ** (len(layout.unet.channels) - 1)
    if resolution_px % step:
        raise InputError(
            f"--resolution {resolution_px}: this model needs a multiple of {step} pixels",
            hint=f"{max(resolution_px // step, 1) * step} is one",
        )


# ---------------------------------------------------------------- what the tables hold


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
    columns = {"fp32": wide, "bf16": plain["none"], **{kind: plain[kind] for kind in QUANTISED}}
    return {
        "UNet": {name: weights.unet for name, weights in columns.items()},
        "text encoders": {name: weights.encoders for name, weights in columns.items()},
        "VAE": {"fp32": wide.vae},  # whatever the precision: it overflows in 16 bits
    }


def _activations(meter: MemoryMeter, setup: Setup) -> tuple[Activations, ...]:
    found: list[Activations] = []
    for size in SIZES_PX:
        for batch in BATCHES:
            say(f"measuring {size} px in batches of {batch}")
            held = [
                meter.measure(
                    replace(setup, resolution_px=size, batch=batch, gradient_checkpointing=checkpointing)
                )
                for checkpointing in (False, True)
            ]
            plain, slow = (memory.kept + memory.working for memory in held)
            found.append(Activations(size, batch, plain, slow))
    return tuple(found)


def _rows(memory: Memory) -> list[tuple[str, int, str]]:
    fixed = memory.fixed
    return [
        ("UNet", fixed.unet, ""),
        ("text encoders", fixed.encoders, ""),
        ("VAE", fixed.vae, "float32"),
        ("frame", fixed.frame, "A0, B0 of the split"),
        ("trained tensors", fixed.trained, "dA, dB, or A, B in the residual form"),
        ("gradients", memory.gradients, ""),
        ("optimiser's state", memory.optimizer, ""),
        ("moving average", memory.average, ""),
        ("activations kept", memory.kept, "between the forward and the backward pass"),
        ("working memory", memory.working, "on top at the worst moment of the step"),
        ("unpacked weight", memory.unpacked, "of the largest quantised layer"),
        ("while it trains", memory.allocated, "sum of the above"),
        ("while latents are made", memory.caching, "all networks and one picture in the VAE"),
        ("reserve", memory.reserve, "assumed"),
        ("the card must have", memory.total, "the larger of the two, and the reserve"),
    ]


def _as_json(
    found: Plan,
    states: Mapping[str, int | None],
    weights: Mapping[str, Mapping[str, int]],
    sizes: Sequence[Activations],
    recipe: str,
) -> dict[str, Any]:
    return {
        "vram": found.vram,
        "best": _candidate_json(found.best),
        "recipe": recipe,
        "runners_up": [_candidate_json(candidate) for candidate in found.runners_up],
        "too_large": [_candidate_json(candidate) for candidate in found.too_large],
        "weights": weights,
        "optimizers": states,
        "activations": [asdict(row) for row in sizes],
        "reserve": {"context": CONTEXT_BYTES, "fragmented_share": FRAGMENTED_SHARE},
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    memory = candidate.memory
    record = {"setup": asdict(candidate.setup), "least": candidate.least}
    if memory is None:
        return record
    sums = {"allocated": memory.allocated, "caching": memory.caching, "reserve": memory.reserve}
    return {**record, "memory": {**asdict(memory), **sums, "total": memory.total}}


# ---------------------------------------------------------------- printing


def _print_weights(weights: Mapping[str, Mapping[str, int]]) -> None:
    columns = ("fp32", "bf16", *QUANTISED)
    rows = [
        (name, *(megabytes(sizes[column]) if column in sizes else "" for column in columns))
        for name, sizes in weights.items()
    ]
    table("frozen weights", ("network", *columns), rows)


def _print_candidates(found: Plan) -> None:
    rows = [
        *((candidate, "too large") for candidate in found.too_large),
        (found.best, "the best that fits"),
        *((candidate, "fits too") for candidate in found.runners_up),
    ]
    order = "from what was asked for to what takes less"
    table(
        f"{order}; the card has {megabytes(found.vram)}",
        ("way of training", "answer", "takes"),
        [(described(one.setup), answer, _size_of(one)) for one, answer in rows],
        left=2,
    )


def _size_of(candidate: Candidate) -> str:
    return f"{'over ' if candidate.memory is None else ''}{megabytes(candidate.least)}"


def _print_memory(memory: Memory) -> None:
    rows = [(name, note, megabytes(nbytes)) for name, nbytes, note in _rows(memory) if nbytes]
    table("the best that fits", ("what", "", "takes"), rows, left=2)


def _print_optimizers(states: Mapping[str, int | None], chosen: str) -> None:
    rows = [
        (name, "" if name != chosen else "planned", "not installed" if size is None else megabytes(size))
        for name, size in states.items()
    ]
    table("state of other optimisers", ("optimiser", "", "takes"), rows, left=2)


def _print_activations(sizes: Sequence[Activations]) -> None:
    rows = [
        (f"{row.resolution_px} px", f"{row.batch}", megabytes(row.plain), megabytes(row.checkpointing))
        for row in sizes
    ]
    table("activations, at their most", ("size", "batch", "all kept", "checkpointing"), rows)


def _print_notes(memory: Memory) -> None:
    if memory.caching > memory.allocated:
        say("  making latents takes the most, before the training: --resolution changes that, --rank little")
    say(
        "  counted on the tensors that the training would make, with attention that keeps no matrix; "
        "no GPU has measured it"
    )
    say(
        f"  the reserve is {megabytes(CONTEXT_BYTES)} for CUDA and {FRAGMENTED_SHARE:.0%} for lost pieces; "
        "previews are not counted"
    )
    say("  12GB is 12,000,000,000 bytes; a card of 12 GB that draws no desktop has about 12GiB")
