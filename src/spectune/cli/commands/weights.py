"""Commands on files alone: no network is run."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch

from spectune import api
from spectune.adapters.coverage import adapter_coverage, coverage_rows
from spectune.adapters.coverage_checkpoint import checkpoint_coverage
from spectune.checkpoints.open import open_checkpoint
from spectune.cli.arguments import parse_device
from spectune.cli.console import megabytes, print_json, print_warning, progress, say, table
from spectune.errors import some_of
from spectune.files.dtypes import parse_dtype
from spectune.files.reader import INDEX_SUFFIX
from spectune.ops import inspect as describe
from spectune.ops.export.adapter import ExportForm, ExportReport
from spectune.ops.null import write_null
from spectune.ops.split import SplitReport, checkpoint_stem, principal_name, residual_name
from spectune.pairs.layer_ranks import RankRequest, choose_ranks, parse_ranks
from spectune.sdxl.layers import build_catalogue
from spectune.sdxl.selection import select_layers


def inspect(path: Path, *, as_json: bool) -> None:
    summary = api.inspect(path)
    if as_json:
        print_json(summary)
    elif isinstance(summary, describe.AdapterSummary):
        _print_adapter(summary)
    else:
        _print_model(summary)


def _print_model(summary: describe.ModelSummary) -> None:
    said = "" if summary.declared else " (assumed: the file does not say)"
    say(f"{summary.label}: SDXL {summary.role}, predicts {summary.prediction}{said}")
    if summary.provenance.flow_shift is not None:
        say(f"  flow shift    {summary.provenance.flow_shift:g}")
    _print_origin(summary.provenance.base_hash, summary.provenance.principal_hash)
    unet = summary.layout.unet
    say(f"  UNet          channels {unet.channels}, transformer depth {unet.depths}, heads {unet.heads}")
    if summary.layout.vae is not None:
        say(f"  VAE           scale {summary.layout.vae.scale:g}, shift {summary.layout.vae.shift:g}")
    rows = [
        (p.name, f"{p.tensors}", f"{p.parameters:,}", megabytes(p.nbytes), " ".join(p.dtypes), f"{p.layers}")
        for p in summary.parts
        if p.tensors
    ]
    table("", ("part", "tensors", "parameters", "size", "types", "factored layers"), rows, left=1)
    costs = [
        (f"{cost.rank}", f"{cost.parameters:,}", megabytes(cost.file_bytes), megabytes(cost.training_bytes))
        for cost in summary.ranks
    ]
    table("what a rank costs", ("rank", "parameters", "file (16 bit)", "training with AdamW"), costs, left=0)


def _print_adapter(summary: describe.AdapterSummary) -> None:
    layers = ", ".join(f"{count} {part}" for part, count in summary.layers.items())
    ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in summary.ranks.items())
    say(f"{summary.label}: {summary.role} adapter in {summary.spelling} spelling")
    say(f"  layers        {layers}")
    say(f"  ranks         {ranks}")
    if list(summary.scales) not in ([], [1.0]):
        scales = ", ".join(f"{scale:g} ({count} layers)" for scale, count in summary.scales.items())
        say(f"  alpha / rank  {scales}")
    say(
        f"  size          {summary.parameters:,} parameters, {megabytes(summary.nbytes)}, "
        f"{' '.join(summary.dtypes)}"
    )
    if summary.replaced:
        say(f"  replaced      {summary.replaced} tensors of the base, whole")
    if summary.provenance.frame:
        say(f"  frame         {summary.provenance.frame}")
    _print_origin(summary.provenance.base_hash, summary.provenance.principal_hash)
    for problem in summary.problems:
        print_warning(problem)


def _print_origin(base_hash: str | None, principal_hash: str | None) -> None:
    if base_hash:
        say(f"  made from     base {base_hash}")
    if principal_hash:
        say(f"  belongs to    principal {principal_hash}")


def split(
    model: Path,
    folder: Path,
    *,
    rank: int | None,
    conv_rank: int | None,
    energy: float | None,
    budget: str | None,
    dtype: str,
    residual_dtype: str | None,
    with_residual: bool,
    layers: Sequence[str],
    svd: str,
    device: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    if dry_run:
        ranks = parse_ranks(rank, conv_rank, energy, budget)
        _plan_split(model, folder, ranks, layers, parse_dtype(dtype), with_residual=with_residual)
        return
    started = time.perf_counter()
    with progress("split") as report:
        result = api.split(
            model,
            folder,
            rank=rank,
            conv_rank=conv_rank,
            energy=energy,
            budget=budget,
            dtype=dtype,
            residual_dtype=residual_dtype,
            with_residual=with_residual,
            layers=layers,
            svd=svd,
            device=parse_device(device),
            force=force,
            progress=report,
        )
    if as_json:
        print_json({**_split_record(result), "seconds": time.perf_counter() - started})
    else:
        _print_split(result)
        say(f"           {time.perf_counter() - started:.1f} s")


def _split_record(result: SplitReport) -> dict[str, object]:
    return {
        "principal": result.principal,
        "residual": result.residual,
        "base_hash": result.base_hash,
        "principal_hash": result.principal_hash,
        "ranks": result.label,
        "layers": len(result.layers),
        "energy": result.energy,
        "excess": result.excess,
        "methods": Counter(layer.method for layer in result.layers),
        "bit_equal_share": result.share if result.residual else None,
        "exceptions": result.exceptions,
    }


def _print_split(result: SplitReport) -> None:
    say(f"principal  {result.principal}  ({megabytes(result.principal.stat().st_size)})")
    ranks = sorted(layer.rank for layer in result.layers)
    spread = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    say(
        f"           {len(result.layers)} layers of rank {spread} hold {result.energy:.1%} of the energy of "
        "their weights"
    )
    if result.excess:
        say(
            f"           the rest is at most {result.excess:.3%} larger than the best factors of these ranks "
            "would leave it (estimated)"
        )
    if result.capped:
        say(f"           {len(result.capped)} layers are smaller than their rank and kept their full rank")
    if result.residual is None:
        return
    say(f"residual   {result.residual}  ({megabytes(result.residual.stat().st_size)})")
    if result.exact:
        kept = f", {result.exceptions:,} of them by a list of exceptions" if result.exceptions else ""
        say(f"           together they give every weight back bit for bit{kept}")
    else:
        say(
            f"           together they give {result.share:.2%} of the factored weights back bit for bit, the "
            "rest but for one rounding (--residual-dtype float32 is exact, float64 for an fp32 model)"
        )


def _plan_split(
    model: Path,
    folder: Path,
    request: RankRequest,
    layers: Sequence[str],
    store: torch.dtype,
    *,
    with_residual: bool,
) -> None:
    with open_checkpoint(model) as source, progress("spectra") as report:
        chosen = select_layers(build_catalogue(source, all_layers=True), layers)
        plan = choose_ranks(source, chosen, request, store=store, progress=report)
    stem = checkpoint_stem(model)
    say(f"would factor {len(plan.ranks)} layers of {model}")
    if plan.left_out:
        say(f"             {len(plan.left_out)} more stay whole in the residual")
    if plan.energy is not None:
        say(f"             they hold {plan.energy:.1%} of the energy")
    name = principal_name(stem, plan.label)
    say(f"would write  {folder / name}  ({plan.parameters:,} parameters, {megabytes(plan.nbytes)})")
    if with_residual:
        say(f"would write  {folder / residual_name(stem)}")


def verify(model: Path, residual: Path, principal: Path, *, as_json: bool) -> bool:
    started = time.perf_counter()
    with progress("verify") as report:
        result = api.verify(model, residual, principal, progress=report)
    coverage = _coverage(principal, residual, model)
    if as_json:
        print_json(
            {
                "ok": result.ok,
                "exact": result.exact,
                "tensors": len(result.records),
                "exact_tensors": result.exact_tensors,
                "bit_equal_share": result.share,
                "max_ulp": result.max_ulp,
                "relative_error": result.relative_error,
                "model_hash": result.hashes.model,
                "rebuilt_hash": result.hashes.rebuilt,
                "principal_hash": result.hashes.principal,
                "problems": result.problems,
                "wrong_layers": result.wrong_layers,
                "inexact": {
                    record.name: asdict(record.agreement) | {"share": record.agreement.share}
                    for record in result.records
                    if not record.agreement.exact
                },
                "programs": coverage,
                "seconds": time.perf_counter() - started,
            }
        )
        return result.ok
    say(
        f"{result.exact_tensors} of {len(result.records)} tensors are bit-identical "
        f"({result.share:.4%} of the weights)"
    )
    say(f"weights of the model   sha256 {result.hashes.model}")
    say(f"weights put together   sha256 {result.hashes.rebuilt}")
    if not result.exact:
        worst = sorted(result.records, key=lambda record: record.agreement.share)[:5]
        rows = [
            (
                r.name,
                f"{r.agreement.share:.2%}",
                f"{r.agreement.max_ulp}",
                f"{r.agreement.relative_error:.1e}",
            )
            for r in worst
        ]
        table("the least exact tensors", ("tensor", "bit-equal", "largest ulp", "relative error"), rows)
    for title, rows in coverage.items():
        table(f"who loads {title}", ("program", "loads", "ignores", "note"), rows, left=4)
    for problem in result.problems:
        print_warning(problem)
    say("the pair holds" if result.ok else "the pair does NOT hold")
    return result.ok


def _coverage(principal: Path, residual: Path, model: Path) -> dict[str, list[tuple[str, ...]]]:
    """For each file of the pair, what other programs load from it and what they ignore."""
    with open_checkpoint(model) as source:
        catalogue = build_catalogue(source, all_layers=True)
    with open_checkpoint(principal) as adapter, open_checkpoint(residual) as rest:
        return {
            principal.name: [tuple(row) for row in coverage_rows(adapter_coverage(adapter, catalogue))],
            residual.name: [tuple(row) for row in coverage_rows(checkpoint_coverage(rest))],
        }


def null(model: Path, out: Path, *, force: bool, as_json: bool) -> None:
    started = time.perf_counter()
    result = write_null(model, out, force=force)
    if as_json:
        print_json(result)
        return
    say(written(result.path, started))
    kept = f", all but {', '.join(result.kept)}" if result.kept else ""
    say(f"{result.tensors} tensors at the places of {model.name} are zero{kept}")


def rebuild(
    adapter: Path,
    base: Path,
    target: Path,
    *,
    strength: str,
    dtype: str | None,
    cast_all: bool,
    force: bool,
    as_json: bool,
) -> None:
    started = time.perf_counter()
    with progress("rebuild") as report:
        result = api.rebuild(
            adapter,
            base,
            target,
            strength=strength,
            dtype=dtype,
            cast_all=cast_all,
            force=force,
            progress=report,
        )
    for warning in result.warnings:
        print_warning(warning)
    if as_json:
        print_json({**asdict(result), "identical": result.identical})
        return
    say(written(result.path, started))
    partly = [f"{found} of {count} {part}" for part, (found, count) in result.layers.items() if found < count]
    if partly:
        say(f"the adapter covers {', '.join(partly)} layers; the others stay as they are")
    say(
        f"{result.changed_tensors} of {result.tensors} tensors changed, "
        f"the rest is byte-identical to {base.name}"
    )
    say(f"the model is {'bit-identical to' if result.identical else 'not bit-identical to'} its original")


def export(
    source: Path,
    target: Path,
    *,
    base: Path | None,
    rank: int | None,
    conv_rank: int | None,
    energy: float | None,
    size: str | None,
    form: str,
    keys: str,
    dtype: str,
    principal: Path | None,
    layers: Sequence[str] | None,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    started = time.perf_counter()
    with progress("export") as report:
        result = api.export(
            source,
            target,
            base=base,
            rank=rank,
            conv_rank=conv_rank,
            energy=energy,
            size=size,
            form=cast("ExportForm", form),  # the API looks at the word
            keys=keys,
            dtype=dtype,
            principal=principal,
            layers=layers,
            device=parse_device(device),
            force=force,
            progress=report,
        )
    for warning in result.warnings:
        print_warning(warning)
    if as_json:
        print_json(_export_record(result, time.perf_counter() - started))
        return
    say(written(result.path, started))
    rows = [
        (
            loss.part,
            f"{loss.layers}",
            _span(loss.lowest_rank, loss.highest_rank),
            f"{loss.truncated}",
            percent(loss.error),
        )
        for loss in result.parts
    ]
    table("", ("part", "layers", "rank", "cut", "error of the change"), rows, left=1)
    say(
        f"{len(result.layers)} layers; the change they make is off by {percent(result.error)} by rounding "
        f"and truncation, at most {percent(result.worst.error)} in {result.worst.name}"
    )
    if result.unchanged:
        say(f"{len(result.unchanged)} layers did not change and are left out")
    if result.lost:
        say(f"{len(result.lost)} layers found no room and are lost: {some_of(result.lost)}")
    if result.outside:
        say(
            f"{len(result.outside)} tensors changed that the LoRA does not hold (biases, norms, embeddings): "
            f"{result.outside_share:.2%} of the squared change"
        )


def _export_record(result: ExportReport, seconds: float) -> dict[str, object]:
    return {
        "path": result.path,
        "hash": result.hash,
        "layers": len(result.layers),
        "error": result.error,
        "parts": {loss.part: asdict(loss) for loss in result.parts},
        "layer_errors": {layer.name: layer.error for layer in result.layers},
        "unchanged": result.unchanged,
        "lost": result.lost,
        "outside": result.outside,
        "outside_share": result.outside_share,
        "warnings": result.warnings,
        "seconds": seconds,
    }


def _span(lowest: int, highest: int) -> str:
    return f"{lowest}" if lowest == highest else f"{lowest}..{highest}"


def written(path: Path, started: float) -> str:
    """The last word of a command: what it wrote, how large it is, how long it took."""
    size = megabytes(sum(part.stat().st_size for part in _files_of(path)))
    return f"wrote {path}  ({size}, {time.perf_counter() - started:.1f} s)"


def _files_of(path: Path) -> list[Path]:
    """The files of a folder, of a sharded checkpoint, or the file itself."""
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    return [path, *(path.with_name(name) for name in dict.fromkeys(shards))]


def percent(share: float) -> str:
    """A small share as a percentage that never reads as nothing."""
    return "less than 0.001%" if 0 < share < 1e-5 else f"{share:.3%}"
