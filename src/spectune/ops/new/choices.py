"""The choices of a new recipe: the prediction type, the settings that fit the card, and the length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import get_args

from spectune.errors import InputError, counted
from spectune.files.provenance import PredictionName
from spectune.files.source import WeightSource, declared_prediction
from spectune.model.device import memory_to_plan
from spectune.ops.new.answers import Answers
from spectune.ops.new.pictures import FoundPictures
from spectune.ops.options.training import NewOptions
from spectune.ops.plan import parse_memory
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.layout import Layout
from spectune.sdxl.prediction_type import hinted_prediction
from spectune.training.memory.account import Setup
from spectune.training.memory.meter import MemoryMeter
from spectune.training.memory.search import described
from spectune.training.memory.search import plan as plan_training
from spectune.training.recipe.defaults import is_full_size

PREDICTIONS: tuple[PredictionName, ...] = get_args(PredictionName)
RANK, SMALL_RANK = 64, 16
RESOLUTIONS_PX = (1024, 768, 512)  # the first that fits the card
BATCHES = (4, 2)  # larger batches, tried if the card has memory left
SMALL_BATCH = 8  # of a base smaller than SDXL
# Rule of thumb of docs/quick-start.md: up to 30 pictures are drawn 100 times each. Beyond, the draws of all
# pictures grow with the square root of their number.
DRAWS_EACH, MANY, FEWEST_DRAWS = 100, 30, 500
ROUND_STEPS = 10
SAVES = 4


@dataclass(frozen=True)
class Chosen:
    """The settings that determine the memory of the run."""

    setup: Setup
    is_full_size: bool
    is_planned: bool  # for the memory of a card
    notes: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        return self.setup.batch


@dataclass(frozen=True)
class Length:
    """The number of steps, and the steps between saves."""

    steps: int
    save_every: int
    warmup: int
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class KnownPrediction:
    """The prediction type of the base, and how it is known."""

    kind: PredictionName
    source: str


def choose_prediction(
    source: WeightSource, passed: PredictionName | None, answers: Answers
) -> KnownPrediction:
    """Return the prediction type that was passed or is declared, else the reply."""
    if passed is not None:
        return KnownPrediction(passed, "as you passed it")
    declared = declared_prediction(source)
    if declared is not None:
        return KnownPrediction(declared, "declared by the checkpoint")
    guess = hinted_prediction(source.label) or "eps"
    reply = answers.get(
        f"{source.label} does not declare its prediction type. Its page says it; most models are eps",
        guess,
        PREDICTIONS,
        assumed=f"{source.label} does not declare its prediction type: {guess} is assumed; pass `prediction` "
        "if its page says otherwise",
    )
    if reply not in PREDICTIONS:
        raise InputError(f"unknown prediction type {reply!r}", hint=f"one of {', '.join(PREDICTIONS)}")
    return KnownPrediction(reply, "the checkpoint does not declare it: check the page of the model")


def choose_memory(
    source: WeightSource, layout: Layout, pictures: FoundPictures, options: NewOptions, answers: Answers
) -> Chosen:
    """Return the rank, batch and memory settings. For a base of SDXL's size they are planned for the card."""
    full = is_full_size(layout)
    rank = options.rank or (RANK if full else SMALL_RANK)
    batch = 1 if full else min(SMALL_BATCH, len(pictures.images))
    setup = Setup(rank=rank, resolution_px=pictures.resolution_px, batch=batch, gradient_checkpointing=full)
    if not full:
        return Chosen(setup, full, False)
    vram = _vram(options, answers)
    if vram is None:
        note = "the memory of the card is not known: nothing was planned for it; `vram` sets it"
        return Chosen(setup, full, False, (note,))
    return _planned(MemoryMeter(layout, build_catalogue(source)), setup, vram, options.tell)


def _vram(options: NewOptions, answers: Answers) -> int | None:
    if options.vram is not None:
        return parse_memory(options.vram)
    found = memory_to_plan()
    if found is not None:
        return found
    reply = answers.get(
        "This machine has no CUDA card. Memory of the card that will train, such as 12GB (empty: not known)",
        "",
    )
    return parse_memory(reply) if reply.strip() else None


def _planned(meter: MemoryMeter, setup: Setup, vram: int, notify: Callable[[str], None]) -> Chosen:
    for resolution in RESOLUTIONS_PX:
        try:
            found = plan_training(meter, replace(setup, resolution_px=resolution), vram, notify)
        except InputError:
            if resolution == RESOLUTIONS_PX[-1]:
                raise
            continue
        best = found.best.setup
        if not best.stream and best.quantize == "none":
            best = _larger_batch(meter, best, vram)
        total = meter.measure(best).total
        note = f"planned for {vram / 1e9:.1f} GB: {described(best)}, about {total / 1e9:.1f} GB"
        return Chosen(best, True, True, (note,))
    raise AssertionError("the loop returns or raises")


def _larger_batch(meter: MemoryMeter, setup: Setup, vram: int) -> Setup:
    larger = (replace(setup, batch=batch) for batch in BATCHES)
    return next((one for one in larger if meter.measure(one).total <= vram), setup)


def choose_length(pictures: int, batch: int, steps: int | None) -> Length:
    """Return the passed number of steps, or that of the rule of thumb; and a save at each quarter."""
    chosen = steps_for(pictures, batch) if steps is None else steps
    times = f"{chosen * batch / pictures:.0f}"
    note = (
        f"{counted(chosen, 'step')} of {counted(batch, 'picture')}: each picture is drawn about {times} times"
    )
    return Length(chosen, _rounded(chosen / SAVES), chosen // 20, (note,) if steps is None else ())


def steps_for(pictures: int, batch: int) -> int:
    """Return the number of steps for a number of pictures, by the rule of thumb."""
    draws = DRAWS_EACH * min(pictures, MANY) * (max(pictures, MANY) / MANY) ** 0.5
    return _rounded(max(draws, FEWEST_DRAWS) / batch)


def _rounded(steps: float) -> int:
    """Round to a multiple of 10, or below it to a whole number; at least 1."""
    return round(steps / ROUND_STEPS) * ROUND_STEPS if steps >= ROUND_STEPS else max(1, round(steps))
