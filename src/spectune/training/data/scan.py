"""Scan a folder of images: usable images with captions and masks, and everything that may be a mistake."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from spectune.errors import counted, some_of
from spectune.training.data.buckets import Size
from spectune.training.data.captions.findings import CaptionFinding, finding_warnings
from spectune.training.data.captions.reading import read_captions
from spectune.training.data.images import SUFFIXES, UnusableImage, as_rgb, has_alpha, load_image
from spectune.training.data.masks import is_mask, mask_file, open_mask
from spectune.training.recipe.sections.data import DataSection

# A strip 1 pixel wide would take gigabytes when it is resized to cover its bucket.
LONGEST_ASPECT = 32

# Called with the path and the upright RGB image of each usable file, from several threads at once.
Look = Callable[[Path, Image.Image], None]


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
class Scan:
    """The images of some folders, and the findings that may be mistakes."""

    images: tuple[CaptionedImage, ...]
    ignored_folders: tuple[Path, ...] = ()
    skipped: tuple[tuple[Path, str], ...] = ()  # image, reason
    without_caption: tuple[Path, ...] = ()  # captioned with the name of their folder
    empty_caption: tuple[Path, ...] = ()
    without_image: tuple[str, ...] = ()  # entries of sidecars
    without_mask: tuple[Path, ...] = ()  # if the recipe uses masks
    unused_masks: tuple[Path, ...] = ()
    captions: tuple[CaptionFinding, ...] = ()

    @classmethod
    def joined(cls, scans: Sequence[Scan]) -> Scan:
        """Return one scan of all folders, in order."""
        parts: dict[str, Any] = {
            field.name: tuple(chain.from_iterable(getattr(scan, field.name) for scan in scans))
            for field in fields(cls)
        }
        return cls(**parts)

    def warnings(self) -> list[str]:
        """Return one line for each kind of finding."""
        skipped = [f"{path.name} {reason}" for path, reason in self.skipped]
        findings: list[tuple[Sequence[Path | str], str, str]] = [
            (self.ignored_folders, "folder", "ignored, not named `N_name`"),
            (skipped, "image", "skipped"),
            (self.without_caption, "image", "without a caption file, captioned with the name of its folder"),
            (self.empty_caption, "caption", "empty"),
            (self.without_image, "caption", "in sidecars without an image"),
            (self.without_mask, "image", "without a mask; the loss covers the complete image"),
            (self.unused_masks, "mask file", "not used"),
        ]
        lines = [
            f"{counted(len(found), noun)} {text}: {_names(found)}" for found, noun, text in findings if found
        ]
        return lines + finding_warnings(self.captions)


def _names(found: Sequence[Path | str]) -> str:
    return some_of([one.name if isinstance(one, Path) else one for one in found])


@dataclass(frozen=True)
class _Facts:
    size: Size
    has_mask: bool


def scan_folder(folder: ImageFolder, data: DataSection, look: Look | None = None) -> Scan:
    """Return the contents of one folder; `look` sees each image while it is in memory.

    Raises:
        InputError: A sidecar or a mask is damaged.
    """
    masks, files = _masks_and_images(folder.path, data.mask_suffix)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # Decode each image completely, to find truncated files now and not after an hour of training.
        results = list(pool.map(lambda path: _facts_or_reason(path, data, look), files))
    pairs = list(zip(files, results, strict=True))
    usable = [(path, facts) for path, facts in pairs if isinstance(facts, _Facts)]
    read = read_captions(
        folder.path, [path for path, _ in usable], data.caption, default=folder.caption, files=files
    )
    images = tuple(
        CaptionedImage(
            path,
            caption=caption.fixed,
            template=None if caption.template == caption.fixed else caption.template,
            size=facts.size,
            repeats=folder.repeats,
            weight=folder.weight,
            mask=mask_file(path, data.mask_suffix) if data.mask == "file" and facts.has_mask else None,
        )
        for (path, facts), caption in zip(usable, read.captions, strict=True)
    )
    named = {
        path
        for (path, _), caption in zip(usable, read.captions, strict=True)
        if not caption.is_own and folder.caption_is_name
    }
    empty = {path for (path, _), caption in zip(usable, read.captions, strict=True) if caption.is_empty}
    used_masks = {image.mask for image in images}
    return Scan(
        images=images,
        skipped=tuple((path, reason) for path, reason in pairs if isinstance(reason, str)),
        without_caption=tuple(path for path, _ in usable if path in named),
        empty_caption=tuple(path for path, _ in usable if path in empty - named),
        without_image=read.without_image,
        without_mask=tuple(path for path, facts in usable if data.mask != "none" and not facts.has_mask),
        unused_masks=tuple(path for path in masks if path not in used_masks),
        captions=read.findings,
    )


def _masks_and_images(folder: Path, mask_suffix: str) -> tuple[list[Path], list[Path]]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    masks = [path for path in files if is_mask(path, mask_suffix)]
    taken = set(masks)
    return masks, [path for path in files if path.suffix.lower() in SUFFIXES and path not in taken]


def _facts_or_reason(path: Path, data: DataSection, look: Look | None) -> _Facts | str:
    """Return the facts of a usable image, or the reason to skip it."""
    try:
        if not path.stat().st_size:
            return "is an empty file"
        loaded = load_image(path)
        image = as_rgb(loaded)
        size = Size(*image.size)
        if max(size.aspect, 1 / size.aspect) > LONGEST_ASPECT:
            return f"is {size.width}x{size.height}, longer than {LONGEST_ASPECT} times its shorter side"
        mask = mask_file(path, data.mask_suffix)
        has_mask = has_alpha(loaded) if data.mask == "alpha" else data.mask == "file" and mask.is_file()
        if has_mask and data.mask == "file":
            open_mask(mask, size)
        if look is not None:
            look(path, image)
        return _Facts(size, has_mask)
    except UnusableImage as error:
        return str(error)
