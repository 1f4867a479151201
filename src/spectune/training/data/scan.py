"""Scan a folder of images: usable images with captions and masks, and possible mistakes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from spectune.errors import counted, some_of
from spectune.extras import install_line
from spectune.training.data.captions.findings import CaptionFinding, finding_warnings
from spectune.training.data.captions.reading import read_captions
from spectune.training.data.facts import Facts, Look, read_facts
from spectune.training.data.masks import is_mask, mask_file, open_mask
from spectune.training.data.pictures.formats import HEIF_SUFFIXES, is_picture, is_unread_picture
from spectune.training.data.pictures.profiles import ProfileKind
from spectune.training.data.pictures.walk import file_names, is_tar
from spectune.training.data.tables.images import CaptionedImage, Columns, FolderImages, ImageFolder
from spectune.training.data.tables.sequences import Chain, Mapped
from spectune.training.recipe.sections.data import DataSection

MOST_WITHOUT_INDEX = 50_000  # images of a folder


@dataclass(frozen=True)
class DataFinding:
    """A possible mistake in the folders."""

    names: Sequence[str]  # of the files or folders, some with a reason
    noun: str  # of one of them
    text: str  # what is the matter, and how to change it

    def __str__(self) -> str:
        """Return a line with the count and the first names."""
        return f"{counted(len(self.names), self.noun)} {self.text}: {some_of(self.names)}"


@dataclass(frozen=True)
class Scan:
    """The images of some folders, and possible mistakes in them."""

    images: Sequence[CaptionedImage]
    ignored_folders: Sequence[Path] = ()
    loose: Sequence[Path] = ()  # images beside `N_name` folders
    below: Sequence[Path] = ()  # images in nested folders
    unread: Sequence[Path] = ()  # in formats that this installation does not read
    skipped: Sequence[tuple[Path, str]] = ()  # image, reason
    several_frames: Sequence[Path] = ()
    converted: Sequence[Path] = ()  # from their color profile
    unusable_profile: Sequence[Path] = ()
    shared_files: Sequence[Path] = ()  # images that share a caption file or a mask with another image
    without_caption: Sequence[Path] = ()  # captioned with the name of their folder
    empty_caption: Sequence[Path] = ()
    without_image: Sequence[str] = ()  # entries of sidecars
    without_mask: Sequence[Path] = ()  # if the recipe uses masks
    unused_masks: Sequence[Path] = ()
    captions: Sequence[CaptionFinding] = ()
    unindexed_tars: Sequence[Path] = ()  # tar files in a folder without an index
    large_folders: Sequence[Path] = ()  # with many images and without an index
    unwritable: Sequence[Path] = ()  # indexes that could not be updated

    @classmethod
    def joined(cls, scans: Sequence[Scan]) -> Scan:
        """Return one scan of all folders, in order."""
        parts: dict[str, Any] = {}
        for field in fields(cls):
            found = [getattr(scan, field.name) for scan in scans]
            is_plain = all(isinstance(one, tuple) for one in found)
            parts[field.name] = tuple(chain.from_iterable(found)) if is_plain else Chain(found)
        return cls(**parts)

    def findings(self) -> list[DataFinding]:
        """Return one finding of each kind that occurs."""
        heif = [path for path in self.unread if path.suffix.lower() in HEIF_SUFFIXES]
        others = [path for path in self.unread if path not in set(heif)]
        found: list[tuple[Sequence[Path | str], str, str]] = [
            (self.ignored_folders, "folder", "ignored, not named `N_name`"),
            (self.below, "image", "in nested folders not used; data.recursive = true includes them"),
            (
                self.loose,
                "image",
                "beside `N_name` folders not used; move them into one, or set data.recursive = true",
            ),
            (heif, "file", f"skipped: reading HEIC needs pillow-heif; {install_line('heif')}"),
            (others, "file", "skipped: the format is not read; convert to PNG or JPEG"),
            ([f"{path.name} {reason}" for path, reason in self.skipped], "image", "skipped"),
            (self.several_frames, "image", "with several frames or pages, of which the first is used"),
            (self.converted, "image", "converted from another color profile to sRGB"),
            (self.unusable_profile, "image", "with an unusable color profile, read as sRGB"),
            (
                self.shared_files,
                "image",
                "with the name of another image but for the suffix: they share one caption file and mask",
            ),
            (self.without_caption, "image", "without a caption file, captioned with the name of its folder"),
            (self.empty_caption, "caption", "empty"),
            (self.without_image, "caption", "in sidecars without an image"),
            (self.without_mask, "image", "without a mask; the loss covers the complete image"),
            (self.unused_masks, "mask file", "not used"),
            (
                self.unindexed_tars,
                "tar file",
                "not used: `spectune dataset index FOLDER` makes an index, through which it is read",
            ),
            (
                self.large_folders,
                "folder",
                f"with more than {MOST_WITHOUT_INDEX:,} images, which each start of a training decodes; "
                "`spectune dataset index FOLDER` makes starts fast",
            ),
            (
                self.unwritable,
                "index",
                "that cannot be updated, so each start reads again what changed; make its folder writable",
            ),
        ]
        return [
            DataFinding(Mapped(names, lambda one: one.name if isinstance(one, Path) else one), noun, text)
            for names, noun, text in found
            if names
        ]

    def warnings(self) -> list[str]:
        """Return one line for each finding."""
        return [*map(str, self.findings()), *finding_warnings(self.captions)]


@dataclass(frozen=True)
class Files:
    """The files of a folder, by name."""

    images: Sequence[Path]
    masks: Sequence[Path]
    unread: Sequence[Path]
    tars: Sequence[Path]

    @classmethod
    def of(cls, folder: Path, names: Iterable[str], mask_suffix: str) -> Files:
        """Sort the files of a folder by their kind."""
        paths = sorted(folder / name for name in names)
        masks = [path for path in paths if is_mask(path, mask_suffix)]
        taken = set(masks)
        return cls(
            images=[path for path in paths if is_picture(path) and path not in taken],
            masks=masks,
            unread=[path for path in paths if is_unread_picture(path)],
            tars=[path for path in paths if is_tar(path)],
        )


def scan_folder(folder: ImageFolder, data: DataSection, look: Look | None = None) -> Scan:
    """Return the contents of one folder; `look` sees each image while it is in memory.

    Raises:
        InputError: A sidecar or a mask is damaged.
    """
    files = Files.of(folder.path, file_names(folder.path), data.mask_suffix)

    def facts_of(path: Path) -> tuple[Facts, bool] | str:
        # Decode each image completely, to find truncated files now and not after an hour of training.
        facts = read_facts(path, look)
        return facts if isinstance(facts, str) else (facts, has_mask(path, facts, data))

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = list(pool.map(facts_of, files.images))
    pairs = list(zip(files.images, results, strict=True))
    usable = [(path, *one) for path, one in pairs if not isinstance(one, str)]
    paths = [path for path, *_ in usable]
    read = read_captions(folder.path, paths, data.caption, default=folder.caption, files=files.images)
    images = [
        CaptionedImage(
            path,
            caption=caption.fixed,
            template=None if caption.template == caption.fixed else caption.template,
            size=facts.size,
            mask=mask_file(path, data.mask_suffix) if data.mask == "file" and masked else None,
        )
        for (path, facts, masked), caption in zip(usable, read.captions, strict=True)
    ]
    named = {
        path
        for path, caption in zip(paths, read.captions, strict=True)
        if not caption.is_own and folder.caption_is_name
    }
    empty = {path for path, caption in zip(paths, read.captions, strict=True) if caption.is_empty}
    used_masks = {image.mask for image in images}
    return Scan(
        images=FolderImages(Columns.of(images), folder, data.mask_suffix),
        unread=tuple(files.unread),
        skipped=tuple((path, reason) for path, reason in pairs if isinstance(reason, str)),
        several_frames=tuple(path for path, facts, _ in usable if facts.has_more_frames),
        converted=tuple(path for path, facts, _ in usable if facts.profile is ProfileKind.OTHER),
        unusable_profile=tuple(path for path, facts, _ in usable if facts.profile is ProfileKind.UNUSABLE),
        shared_files=sharing(files.images, data),
        without_caption=tuple(path for path in paths if path in named),
        empty_caption=tuple(path for path in paths if path in empty - named),
        without_image=read.without_image,
        without_mask=tuple(path for path, _, masked in usable if data.mask != "none" and not masked),
        unused_masks=tuple(path for path in files.masks if path not in used_masks),
        captions=read.findings,
        unindexed_tars=tuple(files.tars),
        large_folders=(folder.path,) if len(files.images) > MOST_WITHOUT_INDEX else (),
    )


def sharing(images: Sequence[Path], data: DataSection) -> tuple[Path, ...]:
    """Return the images that share a caption file or a mask with another image."""
    counts = Counter(path.stem for path in images)
    return tuple(
        path
        for path in images
        if counts[path.stem] > 1
        and (
            any(path.with_suffix(extension).is_file() for extension in data.caption.extensions)
            or (data.mask == "file" and mask_file(path, data.mask_suffix).is_file())
        )
    )


def has_mask(path: Path, facts: Facts, data: DataSection) -> bool:
    """Return whether an image has a mask of the kind that the recipe uses.

    Raises:
        InputError: A mask file is damaged, or does not fit the image.
    """
    if data.mask != "file":
        return data.mask == "alpha" and facts.has_alpha
    mask = mask_file(path, data.mask_suffix)
    if mask.is_file():
        open_mask(mask, facts.size)
        return True
    return False
