"""Draw the losses of a run as a PNG file."""

# pyright: standard
# The type stubs of matplotlib are incomplete.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spectune.files.rename import replacing
from spectune.training.callbacks.loss_table import LossRow

# Okabe and Ito's palette, which color-blind people can tell apart.
_LOSS, _VALIDATION, _RATE = "#0072B2", "#D55E00", "#666666"
_INK, _GRID = "#222222", "#dddddd"
_SIZE_INCHES, _DPI = (9.0, 5.6), 110
_WINDOWS = 50  # the smoothed loss averages about a fiftieth of the run


def draw_losses(rows: Sequence[LossRow], target: Path, *, title: str) -> None:
    """Plot loss, smoothed loss and validation loss, and below them the learning rate. Overwrites `target`."""
    # Without pyplot, which has global state and needs a window system.
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 1), left=0.09, right=0.98, top=0.91, bottom=0.09)
    losses = figure.add_subplot(grid[0])
    rates = figure.add_subplot(grid[1], sharex=losses)
    figure.suptitle(f"Loss of {title}", x=0.09, y=0.97, ha="left", fontsize=15, color=_INK)
    _draw_losses(losses, rows)
    steps, values = _column(rows, "learning_rate")
    rates.plot(steps, values, color=_RATE, linewidth=1.6, marker=_marker(steps))
    rates.set_ylabel("learning rate", color=_INK)
    rates.set_xlabel("step", color=_INK)
    for axes in (losses, rates):
        _style(axes)
    losses.tick_params(labelbottom=False)
    rates.set_ylim(bottom=0)
    with replacing(target) as partial:
        figure.savefig(partial, format="png", metadata={"Title": f"Loss of {title}"})


def _draw_losses(axes: Axes, rows: Sequence[LossRow]) -> None:
    steps, values = _column(rows, "loss")
    if steps:
        axes.plot(
            steps, values, color=_LOSS, alpha=0.3, linewidth=0.9, marker=_marker(steps), label="training loss"
        )
        axes.plot(steps, smoothed(values), color=_LOSS, linewidth=2.2, label="training loss, smoothed")
    steps, values = _column(rows, "validation_loss")
    if steps:
        axes.plot(steps, values, color=_VALIDATION, linewidth=1.8, marker="o", label="validation loss")
    axes.set_ylabel("loss", color=_INK)
    if axes.lines:
        axes.legend(loc="upper right", frameon=False)


def _column(rows: Sequence[LossRow], name: str) -> tuple[list[int], list[float]]:
    """Return the steps that have a value, and the values."""
    pairs = [(row.step, getattr(row, name)) for row in rows if getattr(row, name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smoothed(values: Sequence[float]) -> list[float]:
    """Return a centered moving average. It has the width of the part of the window that is inside the run."""
    half = len(values) // (2 * _WINDOWS)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    places = np.arange(len(values))
    start, stop = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return ((sums[stop] - sums[start]) / (stop - start)).tolist()


def _marker(steps: Sequence[int]) -> str | None:
    return "o" if len(steps) == 1 else None  # a line needs two points


def _style(axes: Axes) -> None:
    axes.tick_params(colors=_INK, length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#888888")
