"""What may be a mistake in the pictures of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spectune.errors import counted, some_of
from spectune.ops.dataset.near_duplicates import NEAR_BITS
from spectune.ops.dataset.records import DatasetPicture, Problem

CROPPED = 0.05  # share of the area
ENLARGED = 1.5  # factor
BLURRED = 50.0  # variance of the Laplacian; a Gaussian blur of 1.5 to 2 pixels brings sharp photos to it

_NAMED = 4  # near duplicates of a group


def is_cropped(picture: DatasetPicture) -> bool:
    """Return whether training crops much of a picture away."""
    return picture.placement.cropped_share > CROPPED


def is_tiny(picture: DatasetPicture) -> bool:
    """Return whether a picture is much smaller than its training size."""
    return picture.enlarged > ENLARGED


def is_blurred(picture: DatasetPicture) -> bool:
    """Return whether a picture has no sharp part."""
    return picture.sharpness < BLURRED


@dataclass(frozen=True)
class _Kind:
    """A kind of problem of single pictures."""

    test: Callable[[DatasetPicture], bool]
    badness: Callable[[DatasetPicture], float]
    text: str
    detail: str


_KINDS = (
    _Kind(
        is_cropped,
        lambda one: one.placement.cropped_share,
        f"losing more than {CROPPED:.0%} of the area to cropping",
        "{0.placement.cropped_share:.0%} of {0.shape}",
    ),
    _Kind(
        is_tiny,
        lambda one: one.enlarged,
        f"to be enlarged more than {ENLARGED:g} times",
        "{0.enlarged:.1f} times, from {0.shape}",
    ),
    _Kind(
        is_blurred,
        lambda one: -one.sharpness,
        f"likely blurred: the variance of the Laplacian is under {BLURRED:g} in all of 16 tiles",
        "{0.sharpness:g}",
    ),
)


def picture_problems(pictures: Sequence[DatasetPicture], groups: Sequence[Sequence[int]]) -> list[Problem]:
    """Return the problems of pictures. `groups` are the indices of pictures that look almost the same."""
    problems: list[Problem] = []
    for kind in _KINDS:
        found = sorted(filter(kind.test, pictures), key=lambda one: (-kind.badness(one), one.name))
        items = tuple(f"{one.name}: {kind.detail.format(one)}" for one in found)
        if items:
            problems.append(Problem(f"{counted(len(items), 'picture')} {kind.text}", items))
    if groups:
        items = tuple(some_of([pictures[index].name for index in group], _NAMED) for group in groups)
        text = (
            f"{counted(len(groups), 'group')} of near duplicates: at most {NEAR_BITS} of 64 bits of their "
            "perceptual hashes differ"
        )
        problems.append(Problem(text, items))
    return problems
