"""Which way of training fits a card: from the one that is asked for down to cheaper ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import tomlkit

from spectune.errors import InputError
from spectune.training.memory.account import Memory, MemoryMeter, Setup
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.recipe.sections.model import Quantization

LOWEST_RANK = 8
RUNNERS_UP = 2
QUANTISED: tuple[Quantization, ...] = ("int8", "nf4")


@dataclass(frozen=True)
class Candidate:
    """A way of training that was looked at."""

    setup: Setup
    memory: Memory | None  # None: too large already without its activations
    least: int  # bytes that it takes, or at least takes

    def fits(self, vram: int) -> bool:
        return self.memory is not None and self.memory.total <= vram


@dataclass(frozen=True)
class Plan:
    """The best way of training that fits, what was too large before it, and cheaper ones after it."""

    vram: int
    too_large: tuple[Candidate, ...]
    best: Candidate
    runners_up: tuple[Candidate, ...]

    @property
    def memory(self) -> Memory:
        assert self.best.memory is not None
        return self.best.memory


def ladder(wish: Setup) -> Iterator[Setup]:
    """Ways of training from what is wished for to the cheapest: each rank whole, then half of it.

    Activations go first, which costs time only; then networks that only wait; then the training of the
    encoders; then digits of the frozen weights; last directions.
    """
    if not wish.gradient_checkpointing:
        yield wish
    rank = wish.rank
    while True:
        yield from _of_rank(replace(wish, rank=rank, gradient_checkpointing=True))
        if rank <= LOWEST_RANK:
            return
        rank = max(rank // 2, LOWEST_RANK)


def _of_rank(slow: Setup) -> Iterator[Setup]:
    yield slow
    idle = replace(slow, offload=("vae",) if slow.trains_text else ("text", "vae"))
    yield idle
    if slow.trains_text and "unet" in slow.parts:
        idle = replace(slow, parts=("unet",), offload=("text", "vae"))
        yield idle
    for kind in QUANTISED:
        idle = replace(idle, form="residual", quantize=kind)
        yield idle
    if OPTIMIZERS[slow.optimizer].rounds_stochastically and slow.trained_precision == "fp32":
        yield replace(idle, trained_precision="bf16")


def plan(meter: MemoryMeter, wish: Setup, vram: int, say: Callable[[str], None] = lambda text: None) -> Plan:
    """The first rung of the ladder that `vram` bytes hold; `say` hears what is being measured.

    Raises InputError that says what the smallest takes when none fits.
    """
    too_large: list[Candidate] = []
    fitting: list[Candidate] = []
    for setup in ladder(wish):
        candidate = _looked_at(meter, setup, vram, say)
        (fitting if candidate.fits(vram) else too_large).append(candidate)
        if len(fitting) > RUNNERS_UP:
            break
    if not fitting:
        smallest = min(too_large, key=lambda candidate: candidate.least)
        raise _nothing_fits(meter, smallest.setup, vram)
    return Plan(vram, tuple(too_large), fitting[0], tuple(fitting[1:]))


def _looked_at(meter: MemoryMeter, setup: Setup, vram: int, say: Callable[[str], None]) -> Candidate:
    least = meter.least(setup)
    if least > vram:
        return Candidate(setup, None, least)
    say(f"measuring {described(setup)}")
    memory = meter.measure(setup)
    return Candidate(setup, memory, memory.total)


def _nothing_fits(meter: MemoryMeter, setup: Setup, vram: int) -> InputError:
    total = meter.measure(setup).total
    return InputError(
        f"nothing fits {vram / 1e9:.2f} GB: the smallest way, {described(setup)}, takes {total / 1e9:.2f} GB "
        f"at {setup.resolution_px} px in batches of {setup.batch}",
        hint="a smaller --resolution or --batch, or another --optimizer, takes less",
    )


def described(setup: Setup) -> str:
    """A way of training in a few words."""
    words = [
        f"rank {setup.rank}",
        "+".join(setup.parts),
        setup.form,
        f"{setup.precision if setup.quantize == 'none' else setup.quantize} base",
    ]
    if setup.trained_precision != "fp32":
        words.append(f"{setup.trained_precision} trained")
    if setup.gradient_checkpointing:
        words.append("checkpointing")
    if setup.offload:
        words.append(f"{'+'.join(setup.offload)} offloaded")
    return ", ".join(words)


def recipe_text(setup: Setup, base: str) -> str:
    """The keys of a recipe that make a run train in this way."""
    model = {
        "base": base,
        "rank": setup.rank,
        "form": setup.form,
        "parts": list(setup.parts),
        "quantize": setup.quantize,
    }
    run = {
        "batch": setup.batch,
        "precision": setup.precision,
        "trained_precision": setup.trained_precision,
        "gradient_checkpointing": setup.gradient_checkpointing,
        "offload": list(setup.offload),
    }
    sections = {
        "model": model,
        "data": {"resolution_px": setup.resolution_px},
        "optimizer": {"name": setup.optimizer},
        "run": run,
    }
    return tomlkit.dumps(sections).rstrip()
