"""Output of `inspect`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from spectune.cli.console import megabytes, print_hint, print_warning, say, table
from spectune.cli.report_parts import loading_json, loading_table
from spectune.errors import counted, some_of
from spectune.ops.inspect.autoencoder import VaeSummary
from spectune.ops.inspect.summary import AdapterSummary, ModelSummary
from spectune.ops.options.model_files import InspectOptions
from spectune.pairs.spectrum_report import GroupSpectrum, LayerSpectrum, SpectrumReport
from spectune.sdxl.inference import adding_parts, missing_parts
from spectune.sdxl.layers import RANKS

Summary = ModelSummary | AdapterSummary | VaeSummary | SpectrumReport
_AT_RANKS = tuple(f"r{rank}" for rank in RANKS)


def show(
    summary: Summary,
    options: InspectOptions,
    seconds: float,
) -> None:
    if isinstance(summary, SpectrumReport):
        _show_spectrum(summary, options, seconds)
    elif isinstance(summary, VaeSummary):
        _print_vae(summary)
    elif isinstance(summary, AdapterSummary):
        _print_adapter(summary)
        if summary.programs:
            loading_table("what other programs load", summary.programs)
        else:
            print_hint(
                "no other program loads this file: `spectune rebuild MODEL FILE` writes the checkpoint"
            )
        for problem in summary.problems:
            print_warning(problem)
    else:
        _print_model(summary)
        single = "" if options.model.is_file() else " if this model is saved as a single file"
        loading_table(f"what other programs load{single}", summary.programs)


def as_json(
    summary: Summary,
    options: InspectOptions,
    seconds: float,
) -> dict[str, Any]:
    if isinstance(summary, SpectrumReport):
        return _spectrum_json(summary, options, seconds)
    if isinstance(summary, VaeSummary):
        return asdict(summary)
    return asdict(summary) | {"programs": loading_json(summary.programs)}


def _print_model(summary: ModelSummary) -> None:
    assumed = "" if summary.declared else " (assumed: the file does not declare it)"
    layout, lacks = summary.layout, missing_parts(summary.layout)
    encoders = layout.te1 is not None and layout.te2 is not None
    kind = f"SDXL {summary.role}" if encoders else f"the UNet of an SDXL, without {lacks}"
    say(f"{summary.label}: {kind}, predicts {summary.prediction}{assumed}")
    if not encoders:
        print_hint(adding_parts(summary.label))
    if summary.provenance.flow_shift is not None:
        say(f"  flow shift    {summary.provenance.flow_shift:g}")
    _print_origin(summary.provenance.base_hash, summary.provenance.principal_hash)
    unet = layout.unet
    say(f"  UNet          channels {unet.channels}, transformer depth {unet.depths}, heads {unet.heads}")
    out = "" if unet.in_channels == unet.out_channels else f" in, {unet.out_channels} out"
    say(f"  latents       {unet.in_channels} channels{out}")
    if layout.vae is not None:
        vae = layout.vae
        quant = "" if vae.quant_convs else ", without quant convolutions"
        say(
            f"  VAE           {vae.latent_channels} channels, scale {vae.scale:g}, shift {vae.shift:g}{quant}"
        )
    if summary.ema:
        say(f"  EMA           of {summary.ema} UNet tensors (in `other`): `spectune convert --ema` uses them")
    rows = [
        (p.name, f"{p.tensors}", f"{p.parameters:,}", megabytes(p.nbytes), " ".join(p.dtypes), f"{p.layers}")
        for p in summary.parts
        if p.tensors
    ]
    table("", ("part", "tensors", "parameters", "size", "dtypes", "factored layers"), rows, left=1)
    costs = [
        (f"{cost.rank}", f"{cost.parameters:,}", megabytes(cost.file_bytes), megabytes(cost.training_bytes))
        for cost in summary.ranks
    ]
    table(
        "cost of a rank",
        ("rank", "parameters", "file (16 bit)", "deltas, gradients, AdamW"),
        costs,
        left=0,
    )


def _print_vae(summary: VaeSummary) -> None:
    say(f"{summary.label}: an autoencoder ({summary.kind}), {summary.keys} key names")
    quant = "" if summary.quant_convs else ", without quant convolutions"
    edge = summary.pixels_per_latent
    say(f"  latents       {summary.channels} channels, {edge} pixels per latent{quant}")
    if summary.packed_channels is not None:
        say(f"  packed        {summary.packed_channels} channels, {2 * edge} pixels per latent")
    found = summary.convention
    if found is not None:
        source = "assumed: the file does not declare them" if found.is_assumed else "declared"
        say(f"  scale, shift  {found.scale:g}, {found.shift:g} ({source})")
    else:
        without = "; packed latents need none" if summary.packed_channels else ""
        say(f"  scale, shift  unknown: the file does not declare them{without}")
    if summary.names:
        say(f"  names         {', '.join(summary.names)} (the form fits; the weights are not compared)")


def _print_adapter(summary: AdapterSummary) -> None:
    layers = ", ".join(f"{count} {part}" for part, count in summary.layers.items())
    ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in summary.ranks.items())
    spelling = f" in {summary.spelling} spelling" if summary.spelling else " of complete tensors"
    say(f"{summary.label}: {summary.role} adapter{spelling}")
    if layers:
        say(f"  layers        {layers}")
    if summary.kinds:
        kinds = ", ".join(f"{kind} ({count} layers)" for kind, count in summary.kinds.items())
        say(f"  kinds         {kinds}")
    if ranks:
        say(f"  ranks         {ranks}")
    if list(summary.scales) not in ([], [1.0]):
        scales = ", ".join(f"{scale:g} ({count} layers)" for scale, count in summary.scales.items())
        say(f"  alpha / rank  {scales}")
    say(
        f"  size          {summary.parameters:,} parameters, {megabytes(summary.nbytes)}, "
        f"{' '.join(summary.dtypes)}"
    )
    if summary.ignored:
        say(f"  ignored       {counted(len(summary.ignored), 'key')}: {some_of(summary.ignored)}")
    if summary.replaced:
        say(
            f"  replaced      {summary.replaced} complete tensors of the base, "
            f"{summary.replaced_parameters:,} parameters"
        )
    if summary.provenance.frame:
        say(f"  frame         {summary.provenance.frame}")
    _print_origin(summary.provenance.base_hash, summary.provenance.principal_hash)


def _print_origin(base_hash: str | None, principal_hash: str | None) -> None:
    if base_hash:
        say(f"  made from     base {base_hash}")
    if principal_hash:
        say(f"  belongs to    principal {principal_hash}")


def _show_spectrum(spectra: SpectrumReport, options: InspectOptions, seconds: float) -> None:
    _print_spectrum(spectra, per_layer=options.per_layer)
    say(f"{len(spectra.layers)} layers in {seconds:.1f} s")
    if options.plot is not None:
        say(f"wrote {options.plot}")


def _spectrum_json(spectra: SpectrumReport, options: InspectOptions, seconds: float) -> dict[str, Any]:
    record = asdict(spectra)
    if not options.per_layer:
        del record["layers"]
    return {**record, "plot": options.plot, "seconds": seconds}


def _print_spectrum(spectra: SpectrumReport, *, per_layer: bool) -> None:
    say(f"{spectra.label}: energy (share of the squared norm) that each rank holds")
    table("by part", _group_columns("part"), [_row(g) for g in (*spectra.parts, spectra.total)])
    table("by block", _group_columns("block"), [_row(group) for group in spectra.blocks])
    if per_layer:
        columns = ("layer", "shape", "full rank", "norm", "largest", *_AT_RANKS, "90 % at", "decay")
        table("by layer", columns, [_layer_row(layer) for layer in spectra.layers], left=2)
    _print_small_layers(spectra)
    say("  90 % at: rank that holds 90 % of the energy; decay: exponent a in s_i ~ i^-a; medians over layers")
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
    table("cost of a rank", columns, costs, left=0)


def _print_small_layers(spectra: SpectrumReport) -> None:
    small = spectra.smaller_than(RANKS[-1])
    if small:
        least = min(layer.full_rank for layer in small)
        say(
            f"  {len(small)} of {len(spectra.layers)} layers have a full rank below {RANKS[-1]} "
            f"(the lowest is {least}); that rank holds 100 % of their energy"
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
    """Format a share. 100 % means complete up to float rounding."""
    return "100 %" if share > 1 - 1e-9 else f"{min(share, 0.999):.1%}"


def _decay(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
