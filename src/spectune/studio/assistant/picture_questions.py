"""Questions about pictures: what is in a folder, and the lengths of captions."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL.ExifTags import Base

from spectune.files.text import UnreadableText, read_text
from spectune.model.text import count_tokens
from spectune.sdxl.layout import SDXL
from spectune.studio.places import Places
from spectune.training.data.buckets import Buckets, Size, training_buckets
from spectune.training.data.captions.reading import ImageCaption, read_captions
from spectune.training.data.captions.text import LARGEST_CAPTION
from spectune.training.data.folders import find_folders
from spectune.training.data.pictures.formats import open_picture
from spectune.training.data.pictures.walk import pictures_in
from spectune.training.data.tables.images import ImageFolder
from spectune.training.recipe.defaults import bucket_defaults
from spectune.training.recipe.sections.captions import CaptionSection
from spectune.training.recipe.sections.data import BucketSection, DataSection

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def pictures(values: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Return a row for each picture of a folder, from the headers of the files: `{"rows": [...]}`.

    Fields: `folder`; `resolution_px`. `dataset` decodes the pictures too, and finds near duplicates.
    """
    folder = places.folder(str(values["folder"]))
    buckets = _buckets(folder, int(values.get("resolution_px", 1024)))
    rows = [row for one in find_folders(folder).folders for row in _rows_of(one, folder, buckets)]
    for row, tokens in zip(rows, count_tokens([row.pop("used") for row in rows]), strict=True):
        row["tokens"] = tokens
    doubled = set(_duplicates(row["path"] for row in rows))
    for row in rows:
        row["duplicate"] = row["path"] in doubled
    return {"rows": rows}


def caption_tokens(values: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Return the number of tokens of each text in `texts`."""
    return {"tokens": count_tokens([str(text) for text in values["texts"]])}


def _buckets(folder: Path, resolution_px: int) -> Buckets:
    data = DataSection(folders=(folder,), resolution_px=resolution_px)
    data = data.model_copy(update={"bucket": BucketSection(**bucket_defaults(data, SDXL))})
    return training_buckets(data)[0]


def _rows_of(folder: ImageFolder, parent: Path, buckets: Buckets) -> Iterator[dict[str, Any]]:
    files = pictures_in(folder.path)
    read = read_captions(folder.path, files, CaptionSection(), default=folder.caption, files=files)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        sizes = list(pool.map(_size, files))
    for path, caption, size in zip(files, read.captions, sizes, strict=True):
        text = _text_in_file(caption, path)
        row: dict[str, Any] = {
            "path": str(path),
            "name": path.relative_to(parent).as_posix(),
            "repeats": folder.repeats,
            "text": text if text is not None else caption.fixed if caption.is_own else "",
            "used": caption.fixed,
            "captioned": caption.is_own and not caption.is_empty,
            "problem": size if isinstance(size, str) else None,
        }
        if isinstance(size, Size):
            placed = buckets.fit(size)
            row |= {
                "size": [size.width, size.height],
                "bucket": [placed.target.width, placed.target.height],
                "cropped": round(placed.cropped_share, 4),
                "enlarged": round(placed.resized.width / size.width, 3),
            }
        yield row


def _size(path: Path) -> Size | str:
    """Return the upright size in the header of a picture, or the reason why it cannot be read."""
    try:
        with open_picture(path) as image:
            sideways = image.getexif().get(Base.Orientation) in _SIDEWAYS
            return Size(image.height, image.width) if sideways else Size(image.width, image.height)
    except Exception as error:  # whatever Pillow raises for a damaged file
        return f"cannot be read: {type(error).__name__}"


def _text_in_file(caption: ImageCaption, picture: Path) -> str | None:
    """Return the whole text of the caption file, or None if the caption is from elsewhere."""
    if caption.source == picture or caption.source.suffix.lower() == ".json":
        return None
    try:
        return read_text(caption.source, largest=LARGEST_CAPTION).text
    except UnreadableText:
        return None


def _duplicates(paths: Iterable[str]) -> Iterator[str]:
    """Yield the files that have the same bytes as another one."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in paths:
        by_size[Path(path).stat().st_size].append(path)
    for group in by_size.values():
        if len(group) > 1:
            by_hash: dict[bytes, list[str]] = defaultdict(list)
            for path in group:
                by_hash[hashlib.sha256(Path(path).read_bytes()).digest()].append(path)
            yield from (path for same in by_hash.values() if len(same) > 1 for path in same)
