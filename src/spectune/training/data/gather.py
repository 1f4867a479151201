"""The images of a run: checks of their sizes, warnings about them, and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from spectune.errors import InputError, counted
from spectune.model.network import no_vae
from spectune.sdxl.layout import Layout
from spectune.training.data.buckets import Size
from spectune.training.data.dataset import Pictures
from spectune.training.data.pictures.tar_files import file_of, member_of
from spectune.training.data.plan import BatchPlan
from spectune.training.data.scan import Scan
from spectune.training.data.tables.images import CaptionedImage, digest, sizes_and_repeats
from spectune.training.recipe.recipe import Recipe

MOST_AREA_LOST = 0.05  # mean share that is cropped away without a warning


def check_sizes(layout: Layout, sizes: Iterable[Size]) -> None:
    """Raise InputError if the model cannot be trained at one of `sizes`."""
    if layout.vae is None:
        raise no_vae()
    step = layout.size_step
    for size in sizes:
        if size.width % step or size.height % step:
            raise InputError(
                f"training size {size.width}x{size.height}: this model needs multiples of {step} pixels",
                hint="change data.resolution_px or data.bucket.step_px",
            )


def data_warnings(
    scan: Scan, pictures: Pictures, validation: Scan | None, *, has_buckets: bool = True
) -> list[str]:
    """Return one line for each kind of possible mistake in the images."""
    warnings = scan.warnings()
    if validation is not None:
        warnings += [f"validation: {warning}" for warning in validation.warnings()]
        if shared := _shared_files(scan.images, validation.images):
            warnings.append(
                f"{counted(shared, 'validation image')} also used for training: "
                "the validation loss does not tell how well the model predicts new images"
            )
    if enlarged := pictures.enlarged():
        warnings.append(f"{counted(enlarged, 'image')} enlarged to the training size")
    return [*warnings, *crop_warnings(pictures, has_buckets=has_buckets)]


def _shared_files(images: Sequence[CaptionedImage], validation: Sequence[CaptionedImage]) -> int:
    """Return the number of validation files that are training files too, also under other names."""
    both = (sizes_and_repeats(one)[0].astype(np.int64) for one in (images, validation))
    keys = [sizes[:, 0] << 32 | sizes[:, 1] for sizes in both]
    same_size = np.flatnonzero(np.isin(keys[0], keys[1])).tolist()
    trained = {_identity(images[index].path) for index in same_size}
    return len(trained & {_identity(image.path) for image in validation})


def _identity(path: Path) -> tuple[int, int, int] | Path:
    """Return the device and the number of a file, and the offset of a member of a tar file."""
    member = member_of(path)
    try:
        status = file_of(path).stat()
    except OSError:
        return path
    if not status.st_ino:  # of file systems without numbers, on Windows
        return path.resolve()
    return status.st_dev, status.st_ino, 0 if member is None else member.offset


def crop_warnings(pictures: Pictures, *, has_buckets: bool) -> list[str]:
    """Return a line if crops remove more than MOST_AREA_LOST of the images."""
    lost = pictures.placements.cropped_shares
    if not len(lost) or (mean := lost.mean()) <= MOST_AREA_LOST:
        return []
    worst = int(lost.argmax())
    remedy = (
        "a lower data.bucket.step_px or min_px, or a higher max_px, keeps more"
        if has_buckets
        else "data.bucket.enabled = true keeps more"
    )
    return [
        f"crops remove {100 * mean:.0f} % of the area of the images on average, {100 * lost[worst]:.0f} % of "
        f"{pictures.images[worst].path.name}; {remedy}"
    ]


def data_hash(pictures: Pictures) -> str:
    """Return a hash of the images' names, captions, repeats, sizes, crops, weights and masks."""
    return hashlib.sha256(f"{digest(pictures.images)} {pictures.placements.digest()}".encode()).hexdigest()


def batch_warnings(recipe: Recipe, plan: BatchPlan) -> list[str]:
    """Return a warning if batches of one image meet options that use the other images of a batch."""
    uses_others = recipe.objective.flow_pairing != "random" or recipe.loss.contrastive_weight
    if not uses_others or not plan.batches_of_one:
        return []
    return [
        f"each epoch has {counted(plan.batches_of_one, 'batch', 'batches')} with one image: "
        "objective.flow_pairing and loss.contrastive_weight do nothing there"
    ]
