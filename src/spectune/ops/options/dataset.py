"""Options of the report on a dataset."""

from __future__ import annotations

from dataclasses import KW_ONLY
from pathlib import Path

from spectune.operation import OperationOptions, argument, option, record
from spectune.ops.options.values import FORCE_HELP
from spectune.training.recipe.sections.base import MOST_IMAGES, MOST_PX


@record
class DatasetOptions(OperationOptions):
    """Report how a training would use folders of pictures: sizes, crops, captions, tags, possible mistakes.

    It changes nothing, and the exit code is 0 with problems too.
    """

    folders: tuple[Path, ...] = argument(
        metavar="FOLDER...", help="Folders of pictures, or parents of `N_name` folders, as in data.folders."
    )
    _: KW_ONLY
    resolution_px: int = option(
        default=1024,
        ge=64,
        le=MOST_PX,
        flag="--resolution",
        help="Training resolution: pictures are scaled to the area of a square with this side in pixels.",
    )
    recursive: bool = option(
        default=False, help="Use the pictures in all nested folders too, as with data.recursive."
    )
    no_upscale: bool = option(
        default=False, help="Do not enlarge small pictures, as with data.bucket.no_upscale."
    )
    tags: int = option(default=20, ge=0, le=MOST_IMAGES, help="Number of the most frequent tags to list.")
    sheet: Path | None = option(
        default=None,
        help="Also write a contact sheet: the parts that training crops away are darkened. Worst first.",
    )
    force: bool = option(default=False, help=FORCE_HELP)


@record
class IndexOptions(OperationOptions):
    """Write an index of folders of pictures, through which a training starts without reading them again.

    An existing index is updated: only new and changed files are read. Pictures in tar files in WebDataset's
    layout are used through an index only.
    """

    folders: tuple[Path, ...] = argument(
        metavar="FOLDER...", help="Folders of pictures, or parents of `N_name` folders, as in data.folders."
    )
    _: KW_ONLY
    recursive: bool = option(
        default=False, help="Index the pictures in all nested folders too, as with data.recursive."
    )
    check: bool = option(
        default=False,
        help="Decode each picture completely, which finds damaged files. Else only its header is read.",
    )
