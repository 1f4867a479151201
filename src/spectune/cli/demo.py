"""The whole way on the embedded tiny SDXL, with a proof at each step and one picture of it all."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from spectune.cli.console import err, heading, megabytes, progress, say, table
from spectune.errors import InputError, SpectuneError
from spectune.operation import operation
from spectune.ops.drawing.models import draw
from spectune.ops.drawing.specs import ModelSpec, Weighted
from spectune.ops.export import export
from spectune.ops.options.pictures import DrawingOptions
from spectune.ops.options.training import DemoOptions
from spectune.ops.rebuild import rebuild
from spectune.ops.split import split
from spectune.ops.verify import verify
from spectune.sampling.contact_sheet import Column, contact_sheet, format_psnr, mean_psnr
from spectune.sampling.generate import SampleSettings
from spectune.training.callbacks import ConsoleProgress, TrainReport
from spectune.training.loop import train
from spectune.training.recipe.file import load_recipe

RANK = 16
SEED = 11
PICTURES = SampleSettings(width=64, height=64, steps=25, cfg=4.0, batch=8)
LORA_AGREES_DB = 45.0  # what 16-bit rounding of the exported factors may cost at most


@dataclass(frozen=True)
class DemoFiles:
    """What the demo starts from."""

    base: Path
    checksum: Path  # sha256sum's format
    recipe: Path
    captions: Path  # one a line


@dataclass
class Clock:
    """Seconds of each stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        heading(f"{len(self.seconds) + 1}. {title}")
        started = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - started


@dataclass(frozen=True)
class Drawn:
    """The five columns of the contact sheet."""

    original: list[Image.Image]
    residual: list[Image.Image]
    pair: list[Image.Image]
    tuned: list[Image.Image]
    lora: list[Image.Image]


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured; PSNR in dB over all pictures of a column."""

    sheet: Path
    share: float  # bit-identical share of the weights that residual + principal give back
    pair_db: float  # residual + principal against the original
    tuned_db: float  # the tuned model against the original
    lora_db: float  # original + LoRA against the tuned model
    export_error: float  # relative, of the LoRA's change
    loss_before: float | None  # on held-out pictures
    loss_after: float | None


def demo_files() -> DemoFiles:
    """The embedded default: beside the package when it was installed as a wheel, else in the repository."""
    here = Path(__file__).resolve()
    for folder in (here.parents[1] / "demo_files", here.parents[3] / "demo"):
        if (folder / "base.safetensors").exists():
            return DemoFiles(
                base=folder / "base.safetensors",
                checksum=folder / "base.sha256",
                recipe=folder / "demo.toml",
                captions=folder / "captions.txt",
            )
    raise InputError("the demo's files are not installed", hint="run it from a clone of the repository")


def check_hash(path: Path, checksum: Path) -> str:
    """The SHA-256 of `path`; raises InputError with both hashes when it is not the one in `checksum`."""
    expected = checksum.read_text(encoding="utf-8").split()[0]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InputError(
            f"{path.name} is damaged: expected sha256 {expected}, got {found}",
            hint="get it again; git-lfs is not used, a fresh clone has it",
        )
    return found


@operation(DemoOptions)
def demo(options: DemoOptions) -> DemoReport:
    """Run every stage into the folder `out`, replacing the files of an earlier demo.

    Raises SpectuneError if a proof fails.
    """
    folder, steps = options.out, options.steps
    source, clock = demo_files(), Clock()
    folder.mkdir(parents=True, exist_ok=True)
    with clock.stage("the embedded base is what it should be"):
        digest = check_hash(source.base, source.checksum)
        say(f"   {source.base.name}, {megabytes(source.base.stat().st_size)}, sha256 {digest[:16]}...")
    with clock.stage(f"split it at rank {RANK} into principal and residual"), progress("split") as report:
        pair = split(source.base, folder, rank=RANK, residual_dtype="float32", force=True, progress=report)
    say(f"   {len(pair.layers)} layers; the principal holds {pair.energy:.1%} of their energy")
    assert pair.residual is not None
    with clock.stage("prove that nothing was lost"), progress("verify") as report:
        proof = verify(source.base, pair.residual, pair.principal, progress=report)
    _require(proof.exact, "residual + principal do not give the base back bit for bit")
    say(f"   {proof.exact_tensors} of {len(proof.records)} tensors rebuilt bit for bit")
    with clock.stage("tune the principal spectrum on 120 pictures in 3D style (delta form)"):
        trained = _train(source, folder, pair.principal, steps)
    tuned = folder / "emoji3d.safetensors"
    rebuilt, lora = folder / "base-emoji3d.safetensors", folder / "emoji3d-lora.safetensors"
    with clock.stage("rebuild the full model"), progress("rebuild") as report:
        rebuild(source.base, tuned, rebuilt, force=True, progress=report)
    with clock.stage("export a plain LoRA"), progress("export") as report:
        exported = export(tuned, lora, base=source.base, force=True, progress=report)
    captions = [line for line in source.captions.read_text(encoding="utf-8").splitlines() if line]
    with clock.stage("draw the same captions and seeds with each"):
        drawn = Drawn(
            original=_draw(ModelSpec(source.base, ()), captions),
            residual=_draw(ModelSpec(pair.residual, ()), captions),
            pair=_draw(ModelSpec(pair.residual, (Weighted(pair.principal, 1.0),)), captions),
            tuned=_draw(ModelSpec(rebuilt, ()), captions),
            lora=_draw(ModelSpec(source.base, (Weighted(lora, 1.0),)), captions),
        )
    sheet = folder / "demo.png"
    contact_sheet(_columns(drawn), captions, cell_px=128).save(sheet)
    report = DemoReport(
        sheet=sheet,
        share=proof.share,
        pair_db=mean_psnr(drawn.original, drawn.pair),
        tuned_db=mean_psnr(drawn.original, drawn.tuned),
        lora_db=mean_psnr(drawn.tuned, drawn.lora),
        export_error=exported.error,
        loss_before=trained.validation_before,
        loss_after=trained.validation_after,
    )
    _print_summary(clock, report, [source.base, pair.principal, pair.residual, tuned, rebuilt, lora])
    _check_promises(report, whole_run=steps is None)
    return report


def _check_promises(report: DemoReport, *, whole_run: bool) -> None:
    _require(math.isinf(report.pair_db), "the pair draws other pictures than the base")
    _require(
        report.lora_db >= LORA_AGREES_DB,
        f"base + LoRA and the rebuilt model agree only to {report.lora_db:.1f} dB",
    )
    if whole_run:  # a few steps by hand need not improve anything
        before, after = report.loss_before, report.loss_after
        improved = before is not None and after is not None and after < before
        _require(improved, "training did not lower the loss on held-out pictures")


def _train(source: DemoFiles, folder: Path, principal: Path, steps: int | None) -> TrainReport:
    overrides = [
        f"model.principal={json.dumps(str(principal.resolve()))}",  # JSON's strings are TOML's
        f"run.output={json.dumps(str(folder.resolve()))}",
        "run.resume=false",
    ]
    if steps is not None:
        overrides.append(f"run.steps={steps}")
    return train(load_recipe(source.recipe, overrides), callbacks=[ConsoleProgress(err)], force=True)


def _draw(spec: ModelSpec, captions: list[str]) -> list[Image.Image]:
    # float32 on every device: the proofs are about weights, not about the rounding of 16-bit arithmetic
    with progress(spec.label) as report:
        options = DrawingOptions(seed=SEED, progress=report)
        return draw(spec, captions, options, PICTURES, dtype=torch.float32)


def _columns(drawn: Drawn) -> list[Column]:
    return [
        Column("original", drawn.original),
        Column("residual", drawn.residual),
        Column("res. + principal", drawn.pair),
        Column("tuned", drawn.tuned),
        Column("original + LoRA", drawn.lora, reference=3),
    ]


def _print_summary(clock: Clock, report: DemoReport, written: list[Path]) -> None:
    table("files", ("file", "size"), [(path.name, megabytes(path.stat().st_size)) for path in written])
    times = [(title, f"{seconds:.1f}") for title, seconds in clock.seconds.items()]
    table("time", ("stage", "seconds"), [*times, ("all", f"{sum(clock.seconds.values()):.1f}")])
    rows = [
        ("base = residual + principal, weights", f"{report.share:.2%} bit-identical"),
        ("base = residual + principal, pictures", format_psnr(report.pair_db)),
        ("tuned change = exported LoRA, weights", f"{report.export_error:.3%} off"),
        ("rebuilt model = base + LoRA, pictures", format_psnr(report.lora_db)),
        ("held-out loss on unseen 3D pictures, base", _loss(report.loss_before)),
        ("held-out loss on unseen 3D pictures, tuned", _loss(report.loss_after)),
    ]
    table("result", ("what", "measured"), rows)


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise SpectuneError(what, hint="this is a defect of spectune; please report it with the output above")


def show(report: DemoReport, options: DemoOptions, seconds: float) -> None:
    """Print the path of the contact sheet; the demo itself prints while it runs."""
    print(report.sheet)
