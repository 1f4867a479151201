"""Find a setup that fits a GPU: try the requested one, then ones that need less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import tomlkit

from spectune.errors import InputError
from spectune.training.memory.account import Memory, Setup
from spectune.training.memory.meter import MemoryMeter
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.recipe.sections.model import Quantization

LOWEST_RANK = 8
RUNNERS_UP = 2
QUANTIZED: tuple[Quantization, ...] = ("int8", "nf4")


@dataclass(frozen=True)
class Candidate:
    """A setup with its memory."""

    setup: Setup
    memory: Memory | None  # None if not measured, because it is too large even without activations
    least: int  # the total bytes, or a lower bound if `memory` is None

    def fits(self, vram: int) -> bool:
        """Return whether the setup fits a GPU with `vram` bytes."""
        return self.memory is not None and self.memory.total <= vram


@dataclass(frozen=True)
class Plan:
    """The first setup that fits, the setups that were too large, and the next smaller ones."""

    vram: int
    too_large: tuple[Candidate, ...]
    best: Candidate
    runners_up: tuple[Candidate, ...]

    @property
    def memory(self) -> Memory:
        """The memory of the best setup."""
        assert self.best.memory is not None
        return self.best.memory


def ladder(requested: Setup) -> Iterator[Setup]:
    """Yield setups from the requested one to the smallest.

    First come the ones that cost time only: checkpointing saves activations, unused networks are offloaded.
    Then the text encoders are frozen, and frozen weights are streamed from main memory. The residual form
    saves the frame. Quantized weights take more GPU memory than streamed ones: they are alternatives for slow
    connections to the GPU. At last the rank is halved, and these steps repeat.
    """
    if not requested.gradient_checkpointing:
        yield requested
    rank = requested.rank
    if rank == "full":
        yield from _full(replace(requested, gradient_checkpointing=True))
        return
    while True:
        yield from _at_rank(replace(requested, rank=rank, gradient_checkpointing=True))
        if rank <= LOWEST_RANK:
            return
        rank = max(rank // 2, LOWEST_RANK)


def _full(setup: Setup) -> Iterator[Setup]:
    yield setup
    lean = replace(setup, offload=("vae",) if setup.trains_text else ("text", "vae"))
    yield lean
    if setup.trains_text and "unet" in setup.parts:
        yield replace(setup, parts=("unet",), offload=("text", "vae"))


def _at_rank(setup: Setup) -> Iterator[Setup]:
    yield setup
    lean = replace(setup, offload=("vae",) if setup.trains_text else ("text", "vae"))
    yield lean
    if setup.trains_text and "unet" in setup.parts:
        lean = replace(setup, parts=("unet",), offload=("text", "vae"))
        yield lean
    lean = replace(lean, stream=True)
    yield lean
    lean = replace(lean, form="residual")
    yield lean
    for kind in QUANTIZED:
        yield replace(lean, stream=False, quantize=kind)
    if OPTIMIZERS[setup.optimizer].rounds_stochastically and setup.trained_precision == "fp32":
        yield replace(lean, trained_precision="bf16")


def plan(
    meter: MemoryMeter, requested: Setup, vram: int, notify: Callable[[str], None] = lambda text: None
) -> Plan:
    """Find the first setup of the ladder that fits in `vram` bytes; `notify` gets progress messages.

    Raises:
        InputError: No setup fits. The message gives the bytes of the smallest.
    """
    too_large: list[Candidate] = []
    fitting: list[Candidate] = []
    for setup in ladder(requested):
        candidate = _candidate(meter, setup, vram, notify)
        (fitting if candidate.fits(vram) else too_large).append(candidate)
        if len(fitting) > RUNNERS_UP:
            break
    if not fitting:
        smallest = min(too_large, key=lambda candidate: candidate.least)
        raise _nothing_fits(meter, smallest.setup, vram)
    return Plan(vram, tuple(too_large), fitting[0], tuple(fitting[1:]))


def _candidate(meter: MemoryMeter, setup: Setup, vram: int, notify: Callable[[str], None]) -> Candidate:
    least = meter.least(setup)
    if least > vram:
        return Candidate(setup, None, least)
    notify(f"measuring {described(setup)}")
    memory = meter.measure(setup)
    return Candidate(setup, memory, memory.total)


def _nothing_fits(meter: MemoryMeter, setup: Setup, vram: int) -> InputError:
    total = meter.measure(setup).total
    return InputError(
        f"nothing fits {vram / 1e9:.2f} GB: the smallest setup, {described(setup)}, takes "
        f"{total / 1e9:.2f} GB at {setup.resolution_px} px with batch {setup.batch}",
        hint="use a smaller `resolution` or `batch`, or another `optimizer`",
    )


def described(setup: Setup) -> str:
    """Return a short description of a setup."""
    form: str = setup.form
    if setup.rank == "full":
        form = "step in backward" if setup.step_in_backward else "step after backward"
    words = [
        "full" if setup.rank == "full" else f"rank {setup.rank}",
        "+".join(setup.parts),
        form,
        f"{setup.precision if setup.quantize == 'none' else setup.quantize} base",
    ]
    if setup.trained_precision != "fp32" and setup.rank != "full":
        words.append(f"{setup.trained_precision} trained")
    if setup.gradient_checkpointing:
        words.append("checkpointing")
    if setup.offload:
        words.append(f"{'+'.join(setup.offload)} offloaded")
    if setup.stream:
        words.append("streamed")
    return ", ".join(words)


def recipe_text(setup: Setup, base: str) -> str:
    """Return the keys of a recipe with this setup, as TOML."""
    of_factors = {} if setup.rank == "full" else {"form": setup.form, "quantize": setup.quantize}
    model = {"base": base, "rank": setup.rank, "parts": list(setup.parts), **of_factors}
    run = {
        "batch": setup.batch,
        "precision": setup.precision,
        "trained_precision": setup.trained_precision,
        "gradient_checkpointing": setup.gradient_checkpointing,
        "offload": list(setup.offload),
        "stream": setup.stream,
    }
    sections = {
        "model": model,
        "data": {"resolution_px": setup.resolution_px},
        "optimizer": {
            "name": setup.optimizer,
            **({"max_grad_norm": 0, "step_in_backward": True} if setup.step_in_backward else {}),
        },
        "run": run,
    }
    return tomlkit.dumps(sections).rstrip()
