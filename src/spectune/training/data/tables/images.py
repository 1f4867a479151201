"""The usable images of a folder in columns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectune.errors import InputError
from spectune.training.data.buckets import Size
from spectune.training.data.masks import mask_file
from spectune.training.data.tables.sequences import Chain, LazySequence
from spectune.training.data.tables.strings import Strings


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images with the settings that its images share."""

    path: Path
    repeats: int
    caption: str  # of images without a caption
    weight: float = 1.0  # of the loss
    caption_is_name: bool = True  # `caption` is from the folder's name, not from the recipe


@dataclass(frozen=True)
class CaptionedImage:
    """A usable image."""

    path: Path
    caption: str  # without variation
    size: Size  # after the EXIF rotation
    repeats: int = 1
    weight: float = 1.0  # of its loss
    mask: Path | None = None  # a gray image in the same folder
    template: str | None = None  # the text that draws vary; None: the caption

    @property
    def text(self) -> str:
        """The text that captions of draws are made from."""
        return self.caption if self.template is None else self.template


@dataclass(frozen=True)
class Columns:
    """What differs between the images of a folder, in their order."""

    names: Strings  # of the files, below the folder
    captions: Strings
    templates: Strings  # empty: the caption
    sizes: NDArray[np.int32]  # (images, 2): width and height in pixels
    masks: NDArray[np.bool_]  # whether the image has a mask file

    @classmethod
    def of(cls, images: Sequence[CaptionedImage]) -> Columns:
        """Return images of one folder as columns."""
        return cls(
            names=Strings.of(image.path.name for image in images),
            captions=Strings.of(image.caption for image in images),
            templates=Strings.of(image.template or "" for image in images),
            sizes=np.array([tuple(image.size) for image in images], dtype=np.int32).reshape(-1, 2),
            masks=np.array([image.mask is not None for image in images], dtype=np.bool_),
        )

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class FolderImages(LazySequence[CaptionedImage]):
    """The images of a folder, made from columns when they are read."""

    columns: Columns
    folder: ImageFolder
    mask_suffix: str

    def __len__(self) -> int:
        return len(self.columns)

    def item(self, index: int) -> CaptionedImage:
        columns = self.columns
        path = self.folder.path / columns.names[index]
        if ".." in path.parts or not path.is_relative_to(self.folder.path):  # of an index from a stranger
            raise InputError(f"the index of {self.folder.path} names a file outside of it: {path}")
        return CaptionedImage(
            path=path,
            caption=columns.captions[index],
            template=columns.templates[index] or None,
            size=Size(*columns.sizes[index].tolist()),
            repeats=self.folder.repeats,
            weight=self.folder.weight,
            mask=mask_file(path, self.mask_suffix) if columns.masks[index] else None,
        )


def sizes_and_repeats(images: Sequence[CaptionedImage]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the sizes (images, 2) and the repeats (images,) of images."""
    parts = _folders(images)
    if not parts:
        return np.empty((0, 2), np.int32), np.empty(0, np.int32)
    sizes = np.concatenate([part.columns.sizes for part in parts])
    return sizes, np.concatenate([np.full(len(part), part.folder.repeats, np.int32) for part in parts])


def digest(images: Sequence[CaptionedImage]) -> str:
    """Return a hash of the images' names, captions, sizes, repeats, weights and masks, in their order."""
    hasher = hashlib.sha256()
    for part in _folders(images):
        columns = part.columns
        hasher.update(repr((len(part), part.folder.repeats, part.folder.weight)).encode())
        arrays: list[NDArray[Any]] = [columns.sizes, columns.masks]
        for strings in (columns.names, columns.captions, columns.templates):
            arrays += [strings.ends, strings.data]
        for array in arrays:
            hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


def _folders(images: Sequence[CaptionedImage]) -> list[FolderImages]:
    """Return the parts of a sequence; images that are not of a table become parts of one image."""
    if isinstance(images, FolderImages):
        return [images]
    if isinstance(images, Chain):
        return [part for images_of in images.parts for part in _folders(images_of)]
    return [
        FolderImages(Columns.of([one]), ImageFolder(one.path.parent, one.repeats, "", one.weight), "")
        for one in images
    ]
