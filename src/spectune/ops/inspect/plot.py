"""Draw the spectrum as a PNG file."""

# pyright: standard
# The type stubs of matplotlib are incomplete.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from spectune.files.rename import replacing
from spectune.pairs.spectrum_report import CURVE_RANKS, GroupSpectrum, SpectrumReport
from spectune.sdxl.layers import RANKS

# Okabe and Ito's palette, which color-blind people can tell apart.
_COLORS = {"unet": "#0072B2", "te1": "#D55E00", "te2": "#009E73"}
_PARTS = {"unet": "UNet", "te1": "text encoder 1", "te2": "text encoder 2"}
_INK, _GREY, _GRID = "#222222", "#8a8a8a", "#dddddd"
_FAINT = 0.35
_BLOCK_RANK = 64
_SIZE_INCHES, _DPI = (13.0, 8.6), 110
_TITLE_PT, _HEADING_PT, _TEXT_PT = 17, 12.5, 10.5
_MAX_LABELLED_BARS = 24


def draw_spectrum(spectra: SpectrumReport, target: Path) -> None:
    """Plot energy by rank, energy by block, and file size by rank. Overwrites `target`."""
    # Without pyplot, which has global state and needs a window system.
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, 2, width_ratios=(1.7, 1), left=0.06, right=0.98, top=0.87, bottom=0.11, hspace=0.42, wspace=0.16
    )
    figure.suptitle(
        f"Spectrum of {_shortened(spectra.label)}, {len(spectra.layers)} layers",
        x=0.06,
        y=0.965,
        ha="left",
        fontsize=_TITLE_PT,
        color=_INK,
    )
    _draw_curves(figure.add_subplot(grid[0, 0]), spectra)
    _draw_costs(figure.add_subplot(grid[0, 1]), spectra)
    _draw_blocks(figure.add_subplot(grid[1, :]), spectra.blocks)
    with replacing(target) as partial:
        figure.savefig(partial, format="png", metadata={"Title": f"Spectrum of {spectra.label}"})


def _draw_curves(axes: Axes, spectra: SpectrumReport) -> None:
    for part in spectra.parts:
        color = _COLORS[part.name]
        low, high, together = (_values(line) for line in (part.lowest, part.highest, part.energies))
        axes.fill_between(CURVE_RANKS, low, high, color=color, alpha=0.13, linewidth=0)
        axes.plot(CURVE_RANKS, together, color=color, linewidth=2.4, label=_PARTS[part.name])
    _style(axes, "Energy held by the first r directions (band: lowest to highest layer)")
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, CURVE_RANKS[-1])
    _mark_ranks(axes, [2**n for n in range(10)])
    _percent_axis(axes)
    axes.legend(loc="upper left", frameon=False, fontsize=_TEXT_PT)
    axes.set_xlabel("rank r", fontsize=_TEXT_PT, color=_INK)


def _draw_costs(axes: Axes, spectra: SpectrumReport) -> None:
    sizes = [cost.file_bytes / 1e6 for cost in spectra.costs]
    places = range(len(sizes))
    bars = axes.bar(places, sizes, width=0.62, color=_GREY)
    labels = [
        f"{_megabytes(size)}\n{_percent(spectra.total.energies[cost.rank])}"
        for size, cost in zip(sizes, spectra.costs, strict=True)
    ]
    axes.bar_label(bars, labels=labels, padding=3, fontsize=_TEXT_PT, color=_INK)
    _style(axes, "Size of a 16-bit file, and the energy it holds")
    axes.grid(visible=False)
    axes.set_xticks(list(places), [f"{cost.rank}" for cost in spectra.costs])
    axes.set_xlabel("rank r", fontsize=_TEXT_PT, color=_INK)
    axes.set_yticks([])  # every bar has its number
    axes.set_ylim(0, max(sizes) * 1.2)


def _draw_blocks(axes: Axes, blocks: Sequence[GroupSpectrum]) -> None:
    places = range(len(blocks))
    crowded = len(blocks) > _MAX_LABELLED_BARS
    energies, lowest, highest = (
        [line[_BLOCK_RANK] for line in lines]
        for lines in zip(*((block.energies, block.lowest, block.highest) for block in blocks), strict=True)
    )
    bars = axes.bar(places, energies, width=0.74, color=[_color(block) for block in blocks])
    axes.vlines(places, lowest, highest, color=_INK, linewidth=1.1)
    if not crowded:
        labels = [
            f"{_percent(energy)}\nfull rank" if _has_full_rank(block) else _percent(energy)
            for energy, block in zip(energies, blocks, strict=True)
        ]
        texts = axes.bar_label(bars, labels=labels, label_type="center", fontsize=_TEXT_PT)
        for text, block in zip(texts, blocks, strict=True):
            text.set_color(_INK if _has_full_rank(block) else "white")
    pale = "; pale: the full rank of every layer" if any(map(_has_full_rank, blocks)) else ""
    heading = f"Energy at rank {_BLOCK_RANK} by block, in the order of the network"
    _style(axes, f"{heading} (line: lowest to highest layer{pale})")
    axes.set_xticks(list(places), [block.name for block in blocks], rotation=90 if crowded else 0)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    _percent_axis(axes)


def _has_full_rank(block: GroupSpectrum) -> bool:
    """Return whether rank 64 is the full rank of every layer of a block."""
    return block.largest_full_rank <= _BLOCK_RANK


def _color(block: GroupSpectrum) -> tuple[float, ...]:
    strength = (
        _FAINT if _has_full_rank(block) else 1.0
    )  # mixed with white, because the grid would show through transparency
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(_COLORS[block.part]))


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=_HEADING_PT, color=_INK, pad=9)
    axes.tick_params(labelsize=_TEXT_PT, colors=_INK, length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#888888")


def _mark_ranks(axes: Axes, ranks: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(ranks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    for rank in RANKS:
        axes.axvline(rank, color=_GRID, linewidth=0.8, zorder=0)


def _values(energies: Mapping[int, float]) -> list[float]:
    return [energies[rank] for rank in CURVE_RANKS]


def _percent(share: float) -> str:
    """Format without decimals. 100% means complete up to float rounding."""
    return "100%" if share > 1 - 1e-9 else f"{min(share, 0.99):.0%}"


def _megabytes(size: float) -> str:
    return f"{size / 1e3:.2f} GB" if size >= 1e3 else f"{size:.3g} MB"


def _shortened(label: str, longest: int = 80) -> str:
    return label if len(label) <= longest else f"{label[: longest - 1]}…"
