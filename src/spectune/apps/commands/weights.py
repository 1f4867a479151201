"""Commands on files alone: no network is run."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from spectune.apps.arguments import parse_dtype
from spectune.apps.console import megabytes, print_json, print_warning, progress, say, table
from spectune.errors import InputError
from spectune.factor.rank import FixedRank, rank_of
from spectune.rebuild import files
from spectune.weights import describe
from spectune.weights.catalogue import build_catalogue
from spectune.weights.reader import open_checkpoint


def inspect(path: Path, *, as_json: bool) -> None:
    with open_checkpoint(path) as source:
        adapter = describe.is_adapter(source)
        summary = describe.describe_adapter(source) if adapter else describe.describe_model(source)
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
    say(f"{summary.label}: {summary.role} adapter")
    say(f"  layers        {layers}")
    say(f"  ranks         {ranks}")
    say(
        f"  size          {summary.parameters:,} parameters, {megabytes(summary.nbytes)}, "
        f"{' '.join(summary.dtypes)}"
    )
    _print_origin(summary.provenance.base_hash, summary.provenance.principal_hash)


def _print_origin(base_hash: str | None, principal_hash: str | None) -> None:
    if base_hash:
        say(f"  made from     base {base_hash}")
    if principal_hash:
        say(f"  belongs to    principal {principal_hash}")


def split(
    model: Path,
    folder: Path,
    *,
    rank: int,
    conv_rank: int | None,
    store: str,
    residual_dtype: str | None,
    with_residual: bool,
    layers: str,
    svd: str,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    if layers not in ("default", "all"):
        raise InputError(f"unknown layer set {layers!r}", hint="default or all")
    if svd not in ("auto", "exact", "gram"):
        raise InputError(f"unknown SVD method {svd!r}", hint="auto or exact")
    stored = parse_dtype(store)
    kept = None if residual_dtype is None else parse_dtype(residual_dtype)
    if dry_run:
        _plan_split(model, folder, FixedRank(rank, conv_rank), layers == "all", with_residual=with_residual)
        return
    started = time.perf_counter()
    with progress("split") as report:
        result = files.split_checkpoint(
            model,
            folder,
            rank=rank,
            conv_rank=conv_rank,
            store=stored,
            residual_dtype=kept,
            with_residual=with_residual,
            all_layers=layers == "all",
            method=svd,
            force=force,
            progress=report,
        )
    if as_json:
        print_json(
            {
                "principal": result.principal,
                "residual": result.residual,
                "base_hash": result.base_hash,
                "principal_hash": result.principal_hash,
                "layers": len(result.layers),
                "energy": result.energy,
                "bit_equal_share": result.share if result.residual else None,
                "max_ulp": result.max_ulp if result.residual else None,
                "seconds": time.perf_counter() - started,
            }
        )
        return
    say(f"principal  {result.principal}  ({megabytes(result.principal.stat().st_size)})")
    say(f"           {len(result.layers)} layers hold {result.energy:.1%} of the energy of their weights")
    if result.capped:
        say(f"           {len(result.capped)} layers are smaller than rank {rank} and kept their full rank")
    if result.residual is not None:
        say(f"residual   {result.residual}  ({megabytes(result.residual.stat().st_size)})")
        if result.exact:
            say("           together they give every weight back bit for bit")
        else:
            say(
                f"           together they give {result.share:.2%} of the factored weights back bit for bit, "
                f"the rest within {result.max_ulp} ulp (--residual-dtype float32 is exact)"
            )
    say(f"           {time.perf_counter() - started:.1f} s")


def _plan_split(model: Path, folder: Path, rule: FixedRank, all_layers: bool, *, with_residual: bool) -> None:
    with open_checkpoint(model) as source:
        catalogue = build_catalogue(source, all_layers=all_layers)
    numbers = sum(
        rank_of(rule, layer.shape) * (layer.in_features + layer.out_features) for layer in catalogue.layers
    )
    stem = files.checkpoint_stem(model)
    say(f"would factor {len(catalogue.layers)} layers of {model}")
    say(f"would write  {folder / files.principal_name(stem, rule.rank)}  ({numbers:,} parameters)")
    if with_residual:
        say(f"would write  {folder / files.residual_name(stem)}")


def verify(model: Path, residual: Path, principal: Path, *, as_json: bool) -> bool:
    started = time.perf_counter()
    with progress("verify") as report:
        result = files.verify_files(model, residual, principal, progress=report)
    if as_json:
        print_json(
            {
                "ok": result.ok,
                "exact": result.exact,
                "tensors": len(result.records),
                "exact_tensors": result.exact_tensors,
                "bit_equal_share": result.share,
                "max_ulp": result.max_ulp,
                "model_hash": result.model_hash,
                "principal_hash": result.principal_hash,
                "problems": result.problems,
                "wrong_layers": result.wrong_layers,
                "seconds": time.perf_counter() - started,
            }
        )
        return result.ok
    say(
        f"{result.exact_tensors} of {len(result.records)} tensors are bit-identical "
        f"({result.share:.4%} of the weights)"
    )
    if not result.exact and result.ok:
        say(f"largest difference {result.max_ulp} ulp: what one rounding of the residual explains")
    for problem in result.problems:
        print_warning(problem)
    say("the pair holds" if result.ok else "the pair does NOT hold")
    return result.ok


def rebuild(
    adapter: Path, base: Path, target: Path, *, strength: float, dtype: str | None, force: bool, as_json: bool
) -> None:
    started = time.perf_counter()
    with progress("rebuild") as report:
        result = files.rebuild_checkpoint(
            adapter,
            base,
            target,
            strength=strength,
            dtype=None if dtype is None else parse_dtype(dtype),
            force=force,
            progress=report,
        )
    for warning in result.warnings:
        print_warning(warning)
    if as_json:
        print_json({**asdict(result), "identical": result.identical})
        return
    say(_written(result.path, started))
    say(
        f"{result.changed_tensors} of {result.tensors} tensors changed, "
        f"the rest is byte-identical to {base.name}"
    )
    say(f"the model is {'bit-identical to' if result.identical else 'not bit-identical to'} its original")


def export(
    adapter: Path,
    base: Path,
    target: Path,
    *,
    rank: int | None,
    form: str,
    store: str,
    force: bool,
    as_json: bool,
) -> None:
    if form not in ("lora", "principal"):
        raise InputError(f"unknown form {form!r}", hint="lora or principal")
    started = time.perf_counter()
    with progress("export") as report:
        result = files.export_adapter(
            adapter,
            base,
            target,
            rank=rank,
            store=parse_dtype(store),
            form=form,
            force=force,
            progress=report,
        )
    if as_json:
        print_json(
            {
                "path": result.path,
                "hash": result.hash,
                "layers": len(result.layers),
                "error": result.error,
                "layer_errors": {layer.name: layer.error for layer in result.layers},
            }
        )
        return
    say(_written(result.path, started))
    say(
        f"{len(result.layers)} layers; the change they make is off by {result.error:.3%} by rounding and "
        f"truncation, at most {result.worst.error:.3%} in {result.worst.name}"
    )


def _written(path: Path, started: float) -> str:
    return f"wrote {path}  ({megabytes(path.stat().st_size)}, {time.perf_counter() - started:.1f} s)"
