"""Compare: the same captions and seeds with several models, on one contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spectune.errors import InputError, counted
from spectune.operation import operation
from spectune.ops.drawing.models import draw, sample_settings
from spectune.ops.drawing.pictures import check_sheet_name, read_captions, read_pictures, refuse_existing
from spectune.ops.drawing.specs import parse_model, unique_labels
from spectune.ops.options.pictures import CompareOptions
from spectune.sampling.contact_sheet import Column, contact_sheet, mean_psnr


@dataclass(frozen=True)
class CompareReport:
    """The contact sheet, and how far each column is from the first."""

    sheet: Path
    psnr_db: tuple[tuple[str, float], ...]  # label and PSNR against the first column, the first one included


@operation(CompareOptions)
def compare(options: CompareOptions) -> CompareReport:
    """Draw the same captions and seeds with several models, or read folders of pictures, into one sheet.

    PSNR is the mean over the pictures of a column against the first column, in dB.
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
        raise InputError("folders of pictures and models cannot be compared with each other")
    else:
        captions = read_captions(options.captions, options.captions_file)
        specs = [parse_model(word) for word in options.models]
        columns = [
            Column(label, draw(spec, captions, options, settings))
            for spec, label in zip(specs, unique_labels(specs), strict=True)
        ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(columns, captions, cell_px=options.cell).save(options.out)
    reference = columns[0].pictures
    found = tuple((column.label, mean_psnr(reference, column.pictures)) for column in columns)
    return CompareReport(options.out, found)


def _from_folders(folders: Sequence[Path]) -> tuple[list[Column], list[str]]:
    read = [read_pictures(folder, folder.name) for folder in folders]
    captions = read[0][1]
    for folder, (_, found) in zip(folders, read, strict=True):
        if found != captions:
            raise InputError(
                f"{folder} and {folders[0]} show different captions",
                hint="sample both with the same captions",
            )
    return [column for column, _ in read], captions
