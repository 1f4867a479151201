"""The facts about an image file that a training needs, and the reasons to skip it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from PIL import Image

from spectune.training.data.buckets import Size
from spectune.training.data.images import as_rgb, has_alpha, load_image, read_header
from spectune.training.data.pictures.formats import UnusableImage
from spectune.training.data.pictures.profiles import ProfileKind, profile_kind

# A strip 1 pixel wide would take gigabytes when it is resized to cover its bucket.
LONGEST_ASPECT = 32
LARGE_PIXELS = 16_000_000  # images above this are decoded one at a time: each needs up to 1 GB
_LARGE = Lock()

# Called with the path and the upright RGB image of each usable file, from several threads at once.
Look = Callable[[Path, Image.Image], None]


@dataclass(frozen=True)
class Facts:
    """The properties of a usable image."""

    size: Size  # after the EXIF rotation
    has_alpha: bool
    has_more_frames: bool
    profile: ProfileKind


def read_facts(path: Path, look: Look | None = None, *, decode: bool = True) -> Facts | str:
    """Return the properties of a usable image, or the reason to skip it.

    Args:
        path: The image file.
        look: Called with the decoded image.
        decode: Decode the image completely, which finds truncated files. Else its header must be enough; an
            image in a format whose header is not is decoded all the same.
    """
    try:
        if path.is_file() and not path.stat().st_size:
            return "is an empty file"
        header = read_header(path)
        if decode or header.upright is None:
            with _one_at_a_time(header.pixels > LARGE_PIXELS):
                loaded = load_image(path)
                image = as_rgb(loaded)
                size = Size(*image.size)
                if look is not None and not _is_strip(size):
                    look(path, image)
            facts = Facts(size, has_alpha(loaded), header.has_more_frames, profile_kind(loaded))
        else:
            facts = Facts(header.upright, header.has_alpha, header.has_more_frames, header.profile)
    except UnusableImage as error:
        return str(error)
    if _is_strip(facts.size):
        size = facts.size
        return f"is {size.width}x{size.height}, longer than {LONGEST_ASPECT} times its shorter side"
    return facts


def _is_strip(size: Size) -> bool:
    return max(size.aspect, 1 / size.aspect) > LONGEST_ASPECT


@contextmanager
def _one_at_a_time(is_large: bool) -> Iterator[None]:
    if not is_large:
        yield
        return
    with _LARGE:
        yield
