"""Scan a folder of images: usable images with captions and masks, and possible mistakes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from spectune.errors import counted, some_of
from spectune.extras import install_line
from spectune.training.data.buckets import Size
from spectune.training.data.captions.findings import CaptionFinding, finding_warnings
from spectune.training.data.captions.reading import read_captions
from spectune.training.data.images import Header, as_rgb, has_alpha, load_image, read_header
from spectune.training.data.masks import is_mask, mask_file, open_mask
from spectune.training.data.pictures.formats import (
    HEIF_SUFFIXES,
    UnusableImage,
    is_picture,
    is_unread_picture,
)
from spectune.training.data.pictures.profiles import ProfileKind, profile_kind
from spectune.training.recipe.sections.data import DataSection

# A strip 1 pixel wide would take gigabytes when it is resized to cover its bucket.
LONGEST_ASPECT = 32
LARGE_PIXELS = 16_000_000  # images above this are decoded one at a time: each needs up to 1 GB
_LARGE = Lock()

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
class DataFinding:
    """A possible mistake in the folders."""

    names: tuple[str, ...]  # of the files or folders, some with a reason
    noun: str  # of one of them
    text: str  # what is the matter, and how to change it

    def __str__(self) -> str:
        """Return a line with the count and the first names."""
        return f"{counted(len(self.names), self.noun)} {self.text}: {some_of(self.names)}"


@dataclass(frozen=True)
class Scan:
    """The images of some folders, and possible mistakes in them."""

    images: tuple[CaptionedImage, ...]
    ignored_folders: tuple[Path, ...] = ()
    loose: tuple[Path, ...] = ()  # images beside `N_name` folders
    below: tuple[Path, ...] = ()  # images in nested folders
    unread: tuple[Path, ...] = ()  # in formats that this installation does not read
    skipped: tuple[tuple[Path, str], ...] = ()  # image, reason
    several_frames: tuple[Path, ...] = ()
    converted: tuple[Path, ...] = ()  # from their color profile
    unusable_profile: tuple[Path, ...] = ()
    shared_files: tuple[Path, ...] = ()  # images that share a caption file or a mask with another image
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
        ]
        return [
            DataFinding(tuple(one.name if isinstance(one, Path) else one for one in names), noun, text)
            for names, noun, text in found
            if names
        ]

    def warnings(self) -> list[str]:
        """Return one line for each finding."""
        return [*map(str, self.findings()), *finding_warnings(self.captions)]


@dataclass(frozen=True)
class _Facts:
    size: Size
    has_mask: bool
    has_more_frames: bool
    profile: ProfileKind


@dataclass(frozen=True)
class _Files:
    """The files of a folder, by name."""

    images: list[Path]
    masks: list[Path]
    unread: list[Path]


def scan_folder(folder: ImageFolder, data: DataSection, look: Look | None = None) -> Scan:
    """Return the contents of one folder; `look` sees each image while it is in memory.

    Raises:
        InputError: A sidecar or a mask is damaged.
    """
    files = _files_in(folder.path, data.mask_suffix)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # Decode each image completely, to find truncated files now and not after an hour of training.
        results = list(pool.map(lambda path: _facts_or_reason(path, data, look), files.images))
    pairs = list(zip(files.images, results, strict=True))
    usable = [(path, facts) for path, facts in pairs if isinstance(facts, _Facts)]
    read = read_captions(
        folder.path, [path for path, _ in usable], data.caption, default=folder.caption, files=files.images
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
        unread=tuple(files.unread),
        skipped=tuple((path, reason) for path, reason in pairs if isinstance(reason, str)),
        several_frames=tuple(path for path, facts in usable if facts.has_more_frames),
        converted=tuple(path for path, facts in usable if facts.profile is ProfileKind.OTHER),
        unusable_profile=tuple(path for path, facts in usable if facts.profile is ProfileKind.UNUSABLE),
        shared_files=_sharing(files.images, data),
        without_caption=tuple(path for path, _ in usable if path in named),
        empty_caption=tuple(path for path, _ in usable if path in empty - named),
        without_image=read.without_image,
        without_mask=tuple(path for path, facts in usable if data.mask != "none" and not facts.has_mask),
        unused_masks=tuple(path for path in files.masks if path not in used_masks),
        captions=read.findings,
    )


def _files_in(folder: Path, mask_suffix: str) -> _Files:
    paths = sorted(path for path in folder.iterdir() if not path.is_dir())
    masks = [path for path in paths if is_mask(path, mask_suffix)]
    taken = set(masks)
    return _Files(
        images=[path for path in paths if is_picture(path) and path not in taken],
        masks=masks,
        unread=[path for path in paths if is_unread_picture(path)],
    )


def _sharing(images: Sequence[Path], data: DataSection) -> tuple[Path, ...]:
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


def _facts_or_reason(path: Path, data: DataSection, look: Look | None) -> _Facts | str:
    """Return the properties of a usable image, or the reason to skip it."""
    try:
        if path.is_file() and not path.stat().st_size:
            return "is an empty file"
        header = read_header(path)
        with _one_at_a_time(header.pixels > LARGE_PIXELS):
            return _look_closely(path, header, data, look)
    except UnusableImage as error:
        return str(error)


def _look_closely(path: Path, header: Header, data: DataSection, look: Look | None) -> _Facts | str:
    """Decode an image and return its properties, or the reason to skip it."""
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
    return _Facts(size, has_mask, header.has_more_frames, profile_kind(loaded))


@contextmanager
def _one_at_a_time(is_large: bool) -> Iterator[None]:
    if not is_large:
        yield
        return
    with _LARGE:
        yield
