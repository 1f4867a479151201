"""Output of `plan`: tables on stderr, the keys of a recipe on stdout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from spectune.cli.console import megabytes, say, show_result, table
from spectune.ops.options.training import PlanOptions
from spectune.ops.plan import Activations, PlanReport
from spectune.training.memory.account import CONTEXT_BYTES, FRAGMENTED_SHARE, Memory
from spectune.training.memory.search import QUANTIZED, Candidate, Plan, described


def prepare(options: PlanOptions) -> PlanOptions:
    return replace(options, notify=say)


def show(result: PlanReport, options: PlanOptions, seconds: float) -> None:
    _print_weights(result.weights)
    _print_candidates(result.found)
    _print_memory(result.found)
    _print_optimizers(result.optimizers, result.found.best.setup.optimizer)
    if result.activations:
        _print_activations(result.activations)
    _print_notes(result.found.memory)
    show_result(result.recipe)


def as_json(result: PlanReport, options: PlanOptions, seconds: float) -> dict[str, Any]:
    found = result.found
    return {
        "vram": found.vram,
        "best": _candidate_json(found.best),
        "recipe": result.recipe,
        "runners_up": [_candidate_json(candidate) for candidate in found.runners_up],
        "too_large": [_candidate_json(candidate) for candidate in found.too_large],
        "weights": result.weights,
        "optimizers": result.optimizers,
        "activations": [asdict(row) for row in result.activations],
        "reserve": {"context": CONTEXT_BYTES, "fragmented_share": FRAGMENTED_SHARE},
    }


def _rows(memory: Memory, vram: int) -> list[tuple[str, int, str]]:
    fixed = memory.fixed
    return [
        ("UNet", fixed.unet, "without the streamed weights" if fixed.stream else ""),
        ("streamed weights", fixed.stream, "a ring that they pass through"),
        ("text encoders", fixed.encoders, ""),
        ("VAE", fixed.vae, "float32"),
        ("frame", fixed.frame, "A0, B0 of the split"),
        ("joined factors", fixed.joined, "in the dtype of the activations, made once per step"),
        ("trained tensors", fixed.trained, "dA, dB, or A, B in the residual form; or complete tensors"),
        ("gradients", memory.gradients, ""),
        ("optimizer state", memory.optimizer, ""),
        ("moving average", memory.average, ""),
        ("activations kept", memory.kept, "between the forward and the backward pass"),
        ("working memory", memory.working, "in addition, at the peak of the step"),
        ("unpacked weight", memory.unpacked, "of the largest quantized layer"),
        ("total while training", memory.allocated, "sum of the above"),
        *_other_stages(memory, vram),
        ("reserve", memory.reserve, "assumed"),
        ("required", memory.total, f"by {memory.limit}, with the reserve"),
    ]


def _other_stages(memory: Memory, vram: int) -> Iterator[tuple[str, int, str]]:
    """Yield a row for each way of the stages besides training, with a mark at the way that a run takes."""
    notes = {
        "encoding images": "before training, one at a time",
        "encoding captions": "before training",
        "sampling previews": "between two steps",
        "decoding previews": "between two steps, one picture at a time",
    }
    for stage, note in notes.items():
        ways = list(memory.stages[stage].items())
        taken = next(index for index, (way, _) in enumerate(ways) if way == memory.way_within(stage, vram))
        for index, (way, nbytes) in enumerate(ways):
            why = note if index == taken else "does not fit" if index < taken else "not needed"
            yield f"{stage}, {way}" if way else stage, nbytes, why


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    memory = candidate.memory
    record = {"setup": asdict(candidate.setup), "least": candidate.least}
    if memory is None:
        return record
    sums = {"allocated": memory.allocated, "limit": memory.limit, "peak": memory.peak}
    return {**record, "memory": {**asdict(memory), **sums, "reserve": memory.reserve, "total": memory.total}}


def _print_weights(weights: Mapping[str, Mapping[str, int]]) -> None:
    columns = ("fp32", "bf16", *QUANTIZED)
    rows = [
        (name, *(megabytes(sizes[column]) if column in sizes else "" for column in columns))
        for name, sizes in weights.items()
    ]
    table("frozen weights", ("network", *columns), rows)


def _print_candidates(found: Plan) -> None:
    rows = [
        *((candidate, "too large") for candidate in found.too_large),
        (found.best, "best that fits"),
        *((candidate, "also fits") for candidate in found.runners_up),
    ]
    table(
        f"from the requested settings to cheaper ones; the GPU has {megabytes(found.vram)}",
        ("settings", "result", "limited by", "memory"),
        [
            (
                described(candidate.setup),
                result,
                candidate.memory.limit if candidate.memory else "",
                _size_of(candidate),
            )
            for candidate, result in rows
        ],
        left=3,
    )


def _size_of(candidate: Candidate) -> str:
    return f"{'over ' if candidate.memory is None else ''}{megabytes(candidate.least)}"


def _print_memory(found: Plan) -> None:
    rows = [
        (name, note, megabytes(nbytes)) for name, nbytes, note in _rows(found.memory, found.vram) if nbytes
    ]
    table("memory of the best settings that fit", ("item", "", "memory"), rows, left=2)


def _print_optimizers(states: Mapping[str, int | None], chosen: str) -> None:
    rows = [
        (name, "" if name != chosen else "planned", "not installed" if size is None else megabytes(size))
        for name, size in states.items()
    ]
    table("state of each optimizer", ("optimizer", "", "memory"), rows, left=2)


def _print_activations(sizes: Sequence[Activations]) -> None:
    rows = [
        (f"{row.resolution_px} px", f"{row.batch}", megabytes(row.plain), megabytes(row.checkpointing))
        for row in sizes
    ]
    table("peak memory of activations", ("size", "batch", "no checkpointing", "checkpointing"), rows)


def _print_notes(memory: Memory) -> None:
    if memory.limit != "training":
        say(f"  {memory.limit} takes more than training: lower --resolution, not --rank")
    say(
        "  the sizes of all tensors of a training step are added up, for attention that stores no matrix; "
        "they were not measured on a GPU"
    )
    say(f"  the reserve is {megabytes(CONTEXT_BYTES)} for CUDA and {FRAGMENTED_SHARE:.0%} for fragmentation")
    if memory.streamed:
        say(
            f"  streaming pins {megabytes(memory.streamed)} of main memory and copies it to the GPU three "
            "times per step: for the forward pass, its recomputation and the backward pass"
        )
    say("  12GB is 12,000,000,000 bytes; a 12 GB card without a desktop has about 12GiB")
