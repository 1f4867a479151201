"""Draw the plots of the page, as PNG files in docs/images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from experiments.trial import Outcome

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
# The palette of Okabe and Ito, which color-blind readers can distinguish.
COLORS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8a8a")
_SIZE_INCHES, _DPI, _TEXT_PT = (8.6, 4.6), 110, 10.5
_GRID, _INK = "#dddddd", "#222222"


def new_axes(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=_TEXT_PT + 2, color=_INK)
    axes.set_xlabel(x_label, fontsize=_TEXT_PT, color=_INK)
    axes.set_ylabel(y_label, fontsize=_TEXT_PT, color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def save(figure: Figure, name: str) -> str:
    """Write a figure and return its path relative to docs/concepts."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / name, format="png", metadata={"Software": ""})
    return f"../images/{name}"


def curves(
    name: str,
    title: str,
    groups: Mapping[str, Sequence[Outcome]],
    *,
    level: tuple[str, float] | None = None,
    top: float | None = None,
    y_label: str = "validation loss",
) -> str:
    """Plot loss over steps: the mean over seeds of each group, with a band from the lowest to the highest."""
    figure, axes = new_axes(title, "steps", y_label)
    for color, (label, outcomes) in zip(COLORS, groups.items(), strict=False):
        steps = [step for step, _ in outcomes[0].curve]
        rows = [[loss for _, loss in outcome.curve] for outcome in outcomes]
        columns = list(zip(*rows, strict=True))
        means = [statistics.fmean(column) for column in columns]
        axes.plot(steps, means, color=color, linewidth=2, label=label)
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    if level is not None:
        axes.axhline(level[1], color="#8a8a8a", linestyle="--", linewidth=1.2, label=level[0])
    if top is not None:
        axes.set_ylim(top=top)
    axes.legend(frameon=False, fontsize=_TEXT_PT - 1)
    return save(figure, name)


def rates(name: str, title: str, groups: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Plot final losses over learning rates."""
    figure, axes = new_axes(title, "learning rate", "validation loss")
    for color, (label, points) in zip(COLORS[1:], groups.items(), strict=False):
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, color=color, linewidth=2, marker="o", label=label)
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=_TEXT_PT - 1)
    return save(figure, name)


def paths(
    name: str,
    title: str,
    groups: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    x_label: str,
    y_label: str,
) -> str:
    """Plot curves of points. The first curve of a group is solid, the others are dashed."""
    figure, axes = new_axes(title, x_label, y_label)
    for color, (label, curves_of_group) in zip(COLORS, groups.items(), strict=False):
        for number, points in enumerate(curves_of_group):
            xs, ys = zip(*points, strict=True)
            style = {"linestyle": "--", "linewidth": 1.2} if number else {"linewidth": 2, "label": label}
            axes.plot(xs, ys, color=color, marker="o", markersize=4, **style)
    axes.legend(frameon=False, fontsize=_TEXT_PT - 1)
    return save(figure, name)


def dots(
    name: str,
    title: str,
    groups: Mapping[str, Sequence[float]],
    x_label: str,
    *,
    level: tuple[str, float] | None = None,
) -> str:
    """Plot one row per group: every seed as a dot, the mean as a bar."""
    figure, axes = new_axes(title, x_label, "")
    labels = list(groups)
    for row, label in enumerate(labels):
        color = COLORS[1 + row % (len(COLORS) - 1)]
        values = list(groups[label])
        axes.plot(values, [row] * len(values), "o", color=color, markersize=7, alpha=0.75)
        axes.plot([statistics.fmean(values)] * 2, [row - 0.3, row + 0.3], color=color, linewidth=3)
    if level is not None:
        axes.axvline(level[1], color="#8a8a8a", linestyle="--", linewidth=1.2, label=level[0])
        axes.legend(frameon=False, fontsize=_TEXT_PT - 1)
    axes.set_yticks(range(len(labels)), labels, fontsize=_TEXT_PT - 1)
    axes.invert_yaxis()
    return save(figure, name)


def strips(name: str, files: Mapping[str, Path]) -> str:
    """Draw image strips in rows, each below its name."""
    pictures = {label: Image.open(file) for label, file in files.items()}
    figure = Figure(
        figsize=(_SIZE_INCHES[0], 1.75 * len(pictures)), dpi=_DPI, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    for axes, (label, picture) in zip(figure.subplots(len(pictures), 1), pictures.items(), strict=True):
        axes.imshow(picture)
        axes.set_title(label, loc="left", fontsize=_TEXT_PT, color=_INK)
        axes.set_axis_off()
    return save(figure, name)
