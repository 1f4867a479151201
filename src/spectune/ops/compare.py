"""Compare several models on one contact sheet: the same captions, the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spectune.errors import InputError, counted
from spectune.operation import operation
from spectune.ops.drawing.models import draw, sample_settings, warn
from spectune.ops.drawing.pictures import (
    caption_notes,
    check_sheet_name,
    read_captions,
    read_pictures,
    refuse_existing,
    save_picture,
)
from spectune.ops.drawing.specs import parse_model, unique_labels
from spectune.ops.options.pictures import CompareOptions
from spectune.sampling.contact_sheet import Column, contact_sheet, mean_psnr


@dataclass(frozen=True)
class CompareReport:
    """The contact sheet, and the PSNR of each column against the first."""

    sheet: Path
    psnr_db: tuple[tuple[str, float], ...]  # label and PSNR of each column, the first one included


@operation(CompareOptions)
def compare(options: CompareOptions) -> CompareReport:
    """Draw the same captions and seeds with several models and save the pictures on one contact sheet.

    If all `models` are folders of pictures, the pictures are read instead. PSNR is in dB, the mean over the
    pictures of a column, compared with the first column.
    """
    if len(options.models) < 2:
        raise InputError(f"{counted(len(options.models), 'model')} to compare: expected two or more")
    settings = sample_settings(options)
    refuse_existing([options.out], force=options.force)
    check_sheet_name(options.out)
    folders = [Path(word).is_dir() and any(Path(word).glob("*.png")) for word in options.models]
    if all(folders):
        columns, captions = _from_folders([Path(word) for word in options.models])
    elif any(folders):
        raise InputError(
            "folders of pictures and model files are mixed: expected only one kind",
            hint="draw the models with `spectune sample`, then compare the folders",
        )
    else:
        captions = read_captions(options.captions, options.captions_file, options.notify or warn)
        for note in caption_notes(captions, options):
            (options.notify or warn)(note)
        specs = [parse_model(word) for word in options.models]
        columns = [
            Column(label, draw(spec, captions, options, settings))
            for spec, label in zip(specs, unique_labels(specs), strict=True)
        ]
    save_picture(contact_sheet(columns, captions, cell_px=options.cell), options.out)
    reference = columns[0].pictures
    psnr_db = tuple((column.label, mean_psnr(reference, column.pictures)) for column in columns)
    return CompareReport(options.out, psnr_db)


def _from_folders(folders: Sequence[Path]) -> tuple[list[Column], list[str]]:
    read = [read_pictures(folder, folder.name) for folder in folders]
    captions = read[0][1]
    for folder, (_, others) in zip(folders, read, strict=True):
        if others != captions:
            raise InputError(
                f"{folder} and {folders[0]} have different captions",
                hint="draw both with the same captions",
            )
    return [column for column, _ in read], captions
