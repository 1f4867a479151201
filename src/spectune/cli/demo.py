"""Run all steps on the tiny embedded SDXL, check the result of each, and draw a contact sheet."""

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

from spectune.cli.console import err, heading, megabytes, progress, say, show_result, table
from spectune.errors import InputError, SpectuneError
from spectune.files.pipeline import report_progress
from spectune.operation import Progress, operation
from spectune.ops.drawing.models import draw
from spectune.ops.drawing.pictures import save_picture
from spectune.ops.drawing.specs import ModelSpec, Weighted
from spectune.ops.export import export
from spectune.ops.options.pictures import DrawingOptions
from spectune.ops.options.training import DemoOptions
from spectune.ops.rebuild import rebuild
from spectune.ops.split import split
from spectune.ops.verify import verify
from spectune.sampling.contact_sheet import Column, contact_sheet, format_psnr, mean_psnr
from spectune.sampling.generate import SampleSettings
from spectune.training.callbacks import Callbacks, RunStart, StepInfo, TrainReport
from spectune.training.callbacks.console import ConsoleProgress
from spectune.training.loop import train
from spectune.training.recipe.file import load_recipe

RANK = 16
SEED = 11
PICTURES = SampleSettings(width=64, height=64, steps=25, cfg=4.0, batch=8)
LORA_AGREES_DB = 45.0  # lowest PSNR that 16-bit rounding of the exported factors may cause


@dataclass(frozen=True)
class DemoFiles:
    """The input files of the demo."""

    base: Path
    checksum: Path  # in the format of sha256sum
    recipe: Path
    captions: Path  # one per line


@dataclass
class Clock:
    """Measures the seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        heading(f"{len(self.seconds) + 1}. {title}")
        started = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - started


@dataclass(frozen=True)
class DemoReport:
    """The measurements of the demo. PSNR is in dB, the mean over all pictures of a column."""

    sheet: Path
    share: float  # share of weights that residual + principal restore bit for bit
    pair_db: float  # residual + principal against the original
    tuned_db: float  # the tuned model against the original
    lora_db: float  # original + LoRA against the tuned model
    export_error: float  # relative error of the exported change
    loss_before: float | None  # validation loss, on held-out pictures
    loss_after: float | None


def demo_files() -> DemoFiles:
    """Return the input files: inside the package for a wheel, else in the repository."""
    here = Path(__file__).resolve()
    for folder in (here.parents[1] / "demo_files", here.parents[3] / "demo"):
        if (folder / "base.safetensors").exists():
            return DemoFiles(
                base=folder / "base.safetensors",
                checksum=folder / "base.sha256",
                recipe=folder / "demo.toml",
                captions=folder / "captions.txt",
            )
    raise InputError(
        "the files of the demo are not installed", hint="run the demo from a clone of the repository"
    )


def check_hash(path: Path, checksum: Path) -> str:
    """Return the SHA-256 of `path`. Raises InputError if it differs from the one in `checksum`."""
    expected = checksum.read_text(encoding="utf-8").split()[0]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InputError(
            f"{path.name} is damaged: expected sha256 {expected}, got {found}",
            hint="clone the repository again (it does not use git-lfs)",
        )
    return found


@operation(DemoOptions)
def demo(options: DemoOptions) -> DemoReport:
    """Run all stages and write to the folder `out`, overwriting the files of an earlier demo.

    Raises SpectuneError if a check fails.
    """
    folder, steps = options.out, options.steps
    source, clock = demo_files(), Clock()
    folder.mkdir(parents=True, exist_ok=True)
    with clock.stage("check the embedded base model"):
        digest = check_hash(source.base, source.checksum)
        say(f"   {source.base.name}, {megabytes(source.base.stat().st_size)}, sha256 {digest[:16]}...")
    with clock.stage(f"split it into principal (rank {RANK}) and residual"), _bar("split", options) as report:
        pair = split(source.base, folder, rank=RANK, residual_dtype="float32", force=True, progress=report)
    say(f"   {len(pair.layers)} layers; the principal holds {pair.energy:.1%} of their energy (squared norm)")
    assert pair.residual is not None
    with clock.stage("verify that residual + principal equal the base"), _bar("verify", options) as report:
        proof = verify(source.base, pair.residual, pair.principal, progress=report)
    _require(proof.exact, "residual + principal differ from the base")
    say(f"   {proof.exact_tensors} of {len(proof.records)} tensors are bit-identical")
    with clock.stage("train the principal spectrum on 120 pictures in 3D style (delta form)"):
        trained = _train(source, folder, pair.principal, options)
    tuned = folder / "emoji3d.safetensors"
    rebuilt, lora = folder / "base-emoji3d.safetensors", folder / "emoji3d-lora.safetensors"
    with clock.stage("rebuild the full model"), _bar("rebuild", options) as report:
        rebuild(source.base, tuned, rebuilt, force=True, progress=report)
    with clock.stage("export a plain LoRA"), _bar("export", options) as report:
        exported = export(tuned, lora, base=source.base, force=True, progress=report)
    captions = [line for line in source.captions.read_text(encoding="utf-8").splitlines() if line]
    with clock.stage("draw the same captions and seeds with each model"):
        original, residual, restored, changed, merged = (
            _draw(ModelSpec(model, adapters), captions, options)
            for model, adapters in (
                (source.base, ()),
                (pair.residual, ()),
                (pair.residual, (Weighted(pair.principal, 1.0),)),
                (rebuilt, ()),
                (source.base, (Weighted(lora, 1.0),)),
            )
        )
    columns = [
        Column("original", original),
        Column("residual", residual),
        Column("res. + principal", restored),
        Column("tuned", changed),
        Column("original + LoRA", merged, reference=3),
    ]
    sheet = folder / "demo.png"
    save_picture(contact_sheet(columns, captions, cell_px=128), sheet)
    report = DemoReport(
        sheet=sheet,
        share=proof.share,
        pair_db=mean_psnr(original, restored),
        tuned_db=mean_psnr(original, changed),
        lora_db=mean_psnr(changed, merged),
        export_error=exported.error,
        loss_before=trained.validation_before,
        loss_after=trained.validation_after,
    )
    _print_summary(clock, report, [source.base, pair.principal, pair.residual, tuned, rebuilt, lora])
    _check_report(report, full_run=steps is None)
    return report


def _check_report(report: DemoReport, *, full_run: bool) -> None:
    _require(math.isinf(report.pair_db), "residual + principal draw other pictures than the base")
    _require(
        report.lora_db >= LORA_AGREES_DB,
        f"pictures of base + LoRA and of the rebuilt model have a PSNR of {report.lora_db:.1f} dB: "
        f"expected at least {LORA_AGREES_DB} dB",
    )
    if full_run:  # a run shortened with `steps` need not lower the loss
        before, after = report.loss_before, report.loss_after
        improved = before is not None and after is not None and after < before
        _require(improved, "training did not lower the validation loss")


def _train(source: DemoFiles, folder: Path, principal: Path, options: DemoOptions) -> TrainReport:
    overrides = [
        f"model.principal={json.dumps(str(principal.resolve()))}",  # a JSON string is a TOML string
        f"run.output={json.dumps(str(folder.resolve()))}",
        "run.resume=false",
    ]
    if options.steps is not None:
        overrides.append(f"run.steps={options.steps}")
    callbacks = [ConsoleProgress(err), _Steps(options)]
    return train(load_recipe(source.recipe, overrides), callbacks=callbacks, force=True)


class _Steps(Callbacks):
    """Passes the steps of the training to the progress function of the demo."""

    def __init__(self, options: DemoOptions) -> None:
        self._options, self._steps = options, 0

    def on_start(self, start: RunStart) -> None:
        self._steps = start.steps

    def on_step(self, info: StepInfo) -> None:
        report_progress(self._options.progress, info.step, self._steps, "training")


@contextmanager
def _bar(title: str, options: DemoOptions) -> Iterator[Progress]:
    """Show the progress as a bar on the terminal, and call `options.progress` with it."""
    with progress(title) as show:

        def report(done: int, total: int, name: str) -> None:
            report_progress(options.progress, done, total, name)
            show(done, total, name)

        yield report


def _draw(spec: ModelSpec, captions: list[str], options: DemoOptions) -> list[Image.Image]:
    # float32 on every device, so that 16-bit arithmetic does not change the pictures
    with _bar(spec.label, options) as report:
        drawing = DrawingOptions(seed=SEED, progress=report)
        return draw(spec, captions, drawing, PICTURES, dtype=torch.float32)


def _print_summary(clock: Clock, report: DemoReport, written: list[Path]) -> None:
    table("files", ("file", "size"), [(path.name, megabytes(path.stat().st_size)) for path in written])
    times = [(title, f"{seconds:.1f}") for title, seconds in clock.seconds.items()]
    table("time", ("stage", "seconds"), [*times, ("total", f"{sum(clock.seconds.values()):.1f}")])
    rows = [
        ("base and residual + principal: weights", f"{report.share:.2%} bit-identical"),
        ("base and residual + principal: pictures", format_psnr(report.pair_db)),
        ("trained change and exported LoRA: weights", f"relative error {report.export_error:.3%}"),
        ("rebuilt model and base + LoRA: pictures", format_psnr(report.lora_db)),
        ("validation loss of the base", _loss(report.loss_before)),
        ("validation loss of the tuned model", _loss(report.loss_after)),
    ]
    table("results", ("comparison", "result"), rows)


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise SpectuneError(problem, hint="this is a bug in spectune; please report it with the output above")


def show(report: DemoReport, options: DemoOptions, seconds: float) -> None:
    """Print the path of the contact sheet. The demo prints everything else while it runs."""
    show_result(str(report.sheet))
