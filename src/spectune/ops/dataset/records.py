"""The report on a dataset."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spectune.training.data.buckets import Placement, Size

TOKEN_STEPS = (75, 150, 225)  # kohya's max_token_length; 75 is what one run of an encoder takes


@dataclass(frozen=True)
class DatasetPicture:
    """A usable picture. Its placement is that of training with a centered crop."""

    path: Path
    name: str  # printable, below the folder of the report
    repeats: int
    caption: str
    tokens: int  # of the caption
    placement: Placement
    sharpness: float  # variance of the Laplacian, in the sharpest of 16 tiles

    @property
    def enlarged(self) -> float:
        """Return the factor that enlarges the picture for training; 1 or less if it is not enlarged."""
        return self.placement.resized.width / self.placement.original.width

    @property
    def shape(self) -> str:
        """Return the size in the file, like `1920x1080`."""
        return f"{self.placement.original.width}x{self.placement.original.height}"


@dataclass(frozen=True)
class DatasetBucket:
    """The pictures of one training size."""

    size: Size
    pictures: int
    draws: int  # in an epoch, with repeats
    cropped: float  # mean share of the area that is cropped away


@dataclass(frozen=True)
class Problem:
    """What may be a mistake, with the pictures that it is about, the worst first."""

    text: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetReport:
    """How a training would use folders of pictures, and possible mistakes in them."""

    folders: tuple[Path, ...]
    resolution_px: int
    pictures: tuple[DatasetPicture, ...]
    captioned: int  # pictures with a caption of their own
    tags: tuple[tuple[str, int], ...]  # the most frequent, with their number of captions
    different_tags: int
    problems: tuple[Problem, ...]
    near_duplicates: tuple[tuple[Path, ...], ...] | None  # None: imagehash is not installed
    sheet: Path | None = None
    shown: int = 0  # pictures on the sheet
    install: str | None = None  # the command that installs imagehash, if it is missing

    @property
    def draws(self) -> int:
        """Return the number of pictures of an epoch."""
        return sum(picture.repeats for picture in self.pictures)

    @property
    def cropped(self) -> float:
        """Return the mean share of the area that is cropped away."""
        return mean_cropped(self.pictures)

    @property
    def buckets(self) -> tuple[DatasetBucket, ...]:
        """Return the training sizes in use, the one with most pictures first."""
        groups: dict[Size, list[DatasetPicture]] = defaultdict(list)
        for picture in self.pictures:
            groups[picture.placement.target].append(picture)
        rows = (
            DatasetBucket(size, len(own), sum(picture.repeats for picture in own), mean_cropped(own))
            for size, own in groups.items()
        )
        return tuple(sorted(rows, key=lambda row: (-row.pictures, row.size)))

    @property
    def longer_captions(self) -> dict[int, int]:
        """Return the number of captions with more than 75, 150 and 225 tokens."""
        return {step: sum(one.tokens > step for one in self.pictures) for step in TOKEN_STEPS}


def mean_cropped(pictures: Sequence[DatasetPicture]) -> float:
    """Return the mean share of the area that is cropped away."""
    return sum(picture.placement.cropped_share for picture in pictures) / len(pictures)


def count_tags(captions: Sequence[str]) -> list[tuple[str, int]]:
    """Return the tags (text between commas) with the number of captions that have them, most first."""
    counts = Counter(
        tag for caption in captions for tag in {tag.strip() for tag in caption.split(",")} if tag
    )
    return sorted(counts.items(), key=lambda row: (-row[1], row[0]))
