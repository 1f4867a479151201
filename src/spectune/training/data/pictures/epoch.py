"""Describe an epoch before the training: sizes, images, batches, optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence

from spectune.errors import counted
from spectune.training.data.dataset import Pictures
from spectune.training.recipe.sections.run import RunSection

SHOWN_SIZES = 8


def described_epoch(pictures: Pictures, run: RunSection, processes: int) -> str:
    """Return how many images, draws, batches and steps an epoch has; with several sizes, also a table."""
    rows = [
        (f"{size.width}x{size.height}", len(members), members.draws)
        for size, members in pictures.buckets().items()
    ]
    counts = [(name, images, draws, -(-draws // run.batch)) for name, images, draws in rows]
    counts.sort(key=lambda row: -row[2])
    batches = sum(row[3] for row in counts)
    steps = round(batches / (run.accumulation * processes), 1)
    sizes = f"at {counts[0][0]}" if len(counts) == 1 else f"in {len(counts)} sizes"
    total = (
        f"an epoch: {counted(pictures.files, 'image')} {sizes}, "
        f"{counted(sum(row[2] for row in counts), 'draw')}, {counted(batches, 'batch', 'batches')}, "
        f"{steps:g} optimizer {'step' if steps == 1 else 'steps'}"
    )
    if run.steps is not None and steps:
        total += f"; run.steps = {run.steps} is {run.steps / steps:.1f} epochs"
    return "\n".join([total, *_table(counts)]) if len(counts) > 1 else total


def _table(counts: Sequence[tuple[str, int, int, int]]) -> list[str]:
    """Return a line for each of the most frequent sizes, and one for all others."""
    shown, others = list(counts[:SHOWN_SIZES]), counts[SHOWN_SIZES:]
    if others:
        images, draws, batches = (sum(column) for column in list(zip(*others, strict=True))[1:])
        shown.append((f"{len(others)} more", images, draws, batches))
    lines = [("size", "images", "draws", "batches"), *shown]
    return [f"  {name:>11} {images:>8} {draws:>8} {batches:>8}" for name, images, draws, batches in lines]
