"""Draw pictures with a model and any number of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spectune.operation import operation
from spectune.ops.drawing.models import draw, sample_settings, warn
from spectune.ops.drawing.pictures import (
    SIDECAR,
    caption_notes,
    check_sheet_name,
    picture_files,
    read_captions,
    refuse_existing,
    save_picture,
    save_pictures,
    save_sidecar,
)
from spectune.ops.drawing.specs import ModelSpec, parse_weighted
from spectune.ops.options.pictures import SampleOptions
from spectune.sampling.contact_sheet import picture_grid


@dataclass(frozen=True)
class SampleReport:
    """The files that `sample` wrote."""

    folder: Path
    pictures: tuple[Path, ...]
    sheet: Path | None


@operation(SampleOptions)
def sample(options: SampleOptions) -> SampleReport:
    """Draw pictures with a checkpoint and any number of adapters.

    Progress counts pictures; `notify` is called with warnings before drawing begins.
    """
    spec = ModelSpec(options.model, tuple(parse_weighted(word) for word in options.adapters))
    settings = sample_settings(options)
    captions = read_captions(options.captions, options.captions_file, options.notify or warn)
    targets, sheet = picture_files(options.out, captions), options.sheet
    if sheet is not None:
        check_sheet_name(sheet)
    sidecar = options.out / SIDECAR if options.metadata else None
    extra = [path for path in (sheet, sidecar) if path is not None]
    refuse_existing([*targets, *extra], force=options.force)
    for note in caption_notes(captions, options):
        (options.notify or warn)(note)
    pictures = draw(spec, captions, options, settings)
    save_pictures(targets, captions, pictures)
    if sidecar is not None:
        save_sidecar(sidecar, targets, captions)
    if sheet is not None:
        save_picture(picture_grid(pictures, captions), sheet)
    return SampleReport(options.out, tuple(targets), sheet)
