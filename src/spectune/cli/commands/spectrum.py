"""`inspect --spectrum`: where the energy of a model lies, and what keeping it costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spectune.checkpoints.open import open_checkpoint
from spectune.checkpoints.plain_weights import check_plain_weights
from spectune.cli.console import megabytes, print_json, progress, say, table
from spectune.errors import InputError
from spectune.files.writer import check_target
from spectune.ops.inspect import is_adapter
from spectune.pairs.layer_spectra import GroupSpectrum, LayerSpectrum, SpectrumReport, measure_spectra
from spectune.sdxl.layers import RANKS, build_catalogue
from spectune.sdxl.selection import select_layers

_AT_RANKS = tuple(f"r{rank}" for rank in RANKS)


def inspect_spectrum(
    model: Path,
    *,
    layers: Sequence[str] = (),
    plot: Path | None = None,
    as_json: bool = False,
    per_layer: bool = False,
    force: bool = False,
) -> None:
    """Measure the spectra of the selected layers; tables on stderr or JSON on stdout, and a PNG plot."""
    if plot is not None:
        _check_plot(plot, force=force)
    started = time.perf_counter()
    with open_checkpoint(model) as source:
        if is_adapter(source):
            raise InputError(
                f"{source.label} is an adapter: expected a model, whose weights have a spectrum",
                hint="pass the checkpoint that it was made from",
            )
        check_plain_weights(source)
        catalogue = build_catalogue(source, all_layers=True)
        selected = replace(catalogue, layers=select_layers(catalogue, layers))
        with progress("spectrum") as report:
            spectra = measure_spectra(source, selected, report)
    seconds = time.perf_counter() - started
    if plot is not None:
        from spectune.cli.plots import draw_spectrum  # matplotlib takes half a second to load

        draw_spectrum(spectra, plot)
    if as_json:
        print_json(_as_json(spectra, plot, seconds, per_layer=per_layer))
        return
    _print(spectra, per_layer=per_layer)
    say(f"{len(spectra.layers)} layers in {seconds:.1f} s")
    if plot is not None:
        say(f"wrote {plot}")


def _check_plot(plot: Path, *, force: bool) -> None:
    """Raise InputError, before anything is measured, for a plot that could not be written."""
    if plot.suffix.lower() != ".png":
        raise InputError(f"{plot} is no .png: the plot is a PNG picture", hint="name it like spectrum.png")
    check_target(plot, 0, force=force)


def _as_json(
    spectra: SpectrumReport, plot: Path | None, seconds: float, *, per_layer: bool
) -> Mapping[str, Any]:
    record = asdict(spectra)
    if not per_layer:
        del record["layers"]
    return {**record, "plot": plot, "seconds": seconds}


def _print(spectra: SpectrumReport, *, per_layer: bool) -> None:
    say(f"{spectra.label}: energy (share of the squared norm) that a rank holds")
    table("by part", _group_columns("part"), [_row(g) for g in (*spectra.parts, spectra.total)])
    table("by block", _group_columns("block"), [_row(group) for group in spectra.blocks])
    if per_layer:
        columns = ("layer", "shape", "full rank", "norm", "largest", *_AT_RANKS, "90 % at", "decay")
        table("by layer", columns, [_layer_row(layer) for layer in spectra.layers], left=2)
    _say_small(spectra)
    say("  90 % at: the rank that holds 90 % of a layer, decay: a of s_i ~ i^-a; medians over the layers")
    costs = [
        (
            f"{cost.rank}",
            _percent(spectra.total.energies[cost.rank]),
            f"{cost.parameters:,}",
            megabytes(cost.file_bytes),
            megabytes(cost.training_bytes),
        )
        for cost in spectra.costs
    ]
    columns = ("rank", "energy", "parameters", "file (16 bit)", "training with AdamW")
    table("what a rank costs", columns, costs, left=0)


def _say_small(spectra: SpectrumReport) -> None:
    small = spectra.smaller_than(RANKS[-1])
    if small:
        least = min(layer.full_rank for layer in small)
        say(
            f"  {len(small)} of {len(spectra.layers)} layers have a full rank below {RANKS[-1]} "
            f"(the smallest {least}): from there on all of their energy is held, 100 %"
        )


def _group_columns(name: str) -> tuple[str, ...]:
    return (name, "layers", "full rank", *_AT_RANKS, "90 % at", "decay")


def _row(group: GroupSpectrum) -> tuple[str, ...]:
    low, high = group.smallest_full_rank, group.largest_full_rank
    return (
        group.name,
        f"{group.layers}",
        f"{low}" if low == high else f"{low}..{high}",
        *(_percent(group.energies[rank]) for rank in RANKS),
        f"{group.median_rank_90:g}",
        _decay(group.median_decay),
    )


def _layer_row(layer: LayerSpectrum) -> tuple[str, ...]:
    return (
        layer.name,
        "x".join(str(n) for n in layer.shape),
        f"{layer.full_rank}",
        f"{layer.norm:.3g}",
        f"{layer.largest:.3g}",
        *(_percent(layer.energies[rank]) for rank in RANKS),
        f"{layer.rank_90}",
        _decay(layer.decay),
    )


def _percent(share: float) -> str:
    """100 % only where nothing is missing but rounding."""
    return "100 %" if share > 1 - 1e-9 else f"{min(share, 0.999):.1%}"


def _decay(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
