"""Report on a dataset before training.

* measures: sharpness and hash of each picture, while it is decoded.
* indexing: the operation that writes indexes.
* near_duplicates: pictures that look almost the same.
* problems: what may be a mistake.
* records: the report.
* sheet: the contact sheet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spectune.errors import counted, printable
from spectune.extras import install_line
from spectune.model.text import count_tokens
from spectune.operation import operation
from spectune.ops.dataset.measures import Measurer
from spectune.ops.dataset.near_duplicates import near_groups
from spectune.ops.dataset.problems import picture_problems
from spectune.ops.dataset.records import DatasetPicture, DatasetReport, Problem, count_tags
from spectune.ops.dataset.sheet import write_sheet
from spectune.ops.drawing.pictures import check_sheet_name, refuse_existing
from spectune.ops.options.dataset import DatasetOptions
from spectune.sdxl.layout import SDXL
from spectune.training.data.buckets import Buckets, training_buckets
from spectune.training.data.captions.findings import finding_warnings
from spectune.training.data.folders import scan_training
from spectune.training.data.pictures.formats import is_picture
from spectune.training.data.scan import Scan
from spectune.training.recipe.defaults import bucket_defaults
from spectune.training.recipe.sections.data import BucketSection, DataSection


@operation(DatasetOptions)
def dataset(options: DatasetOptions) -> DatasetReport:
    """Report how a training would use folders of pictures, and list possible mistakes in them.

    Pictures, captions and training sizes are read and chosen as in a training with the default keys of
    [data]. Nothing is changed.
    """
    if options.sheet is not None:
        check_sheet_name(options.sheet)
        refuse_existing([options.sheet], force=options.force)
    data = _data_section(options)
    (buckets,) = training_buckets(data)
    files = sum(is_picture(path) for folder in options.folders for path in folder.rglob("*"))
    measurer = Measurer(buckets, files, options.progress)
    scan = scan_training(data, measurer)
    pictures = _pictures(scan, measurer, buckets, options.folders)
    hashes = [measured.hash for one in pictures if (measured := measurer.results[one.path]).hash is not None]
    groups = near_groups(hashes) if hashes else []
    tags = count_tags([one.caption for one in pictures])
    doubled = {index for group in groups for index in group}
    shown = 0 if options.sheet is None else write_sheet(options.sheet, pictures, doubled)
    problems = (*_scan_problems(scan), *picture_problems(pictures, groups))
    return DatasetReport(
        folders=options.folders,
        resolution_px=options.resolution_px,
        pictures=pictures,
        captioned=len(pictures) - len(scan.without_caption) - len(scan.empty_caption),
        tags=tuple(tags[: options.tags]),
        different_tags=len(tags),
        problems=problems,
        near_duplicates=tuple(tuple(pictures[index].path for index in group) for group in groups)
        if hashes
        else None,
        install=None if hashes else install_line("dataset"),
        sheet=options.sheet,
        shown=shown,
    )


def _scan_problems(scan: Scan) -> list[Problem]:
    """Return what the scan of training found."""
    files = [
        Problem(f"{counted(len(one.names), one.noun)} {one.text}", tuple(map(printable, one.names)))
        for one in scan.findings()
    ]
    return [*files, *(Problem(printable(line, 2000)) for line in finding_warnings(scan.captions))]


def _data_section(options: DatasetOptions) -> DataSection:
    """Return the images and the buckets of a training of SDXL."""
    data = DataSection(
        folders=options.folders, resolution_px=options.resolution_px, recursive=options.recursive
    )
    return data.model_copy(
        update={"bucket": BucketSection(**bucket_defaults(data, SDXL), no_upscale=options.no_upscale)}
    )


def _pictures(
    scan: Scan, measurer: Measurer, buckets: Buckets, folders: Sequence[Path]
) -> tuple[DatasetPicture, ...]:
    tokens = count_tokens([image.caption for image in scan.images])
    return tuple(
        DatasetPicture(
            path=image.path,
            name=_name(image.path, folders),
            repeats=image.repeats,
            caption=image.caption,
            tokens=count,
            placement=buckets.fit(image.size),
            sharpness=measurer.results[image.path].sharpness,
        )
        for image, count in zip(scan.images, tokens, strict=True)
    )


def _name(path: Path, folders: Sequence[Path]) -> str:
    """Return the name of a file in its folder, with the top folder if there are several."""
    folder = next(folder for folder in folders if path.is_relative_to(folder))
    return printable(path.relative_to(folder if len(folders) == 1 else folder.parent).as_posix())
