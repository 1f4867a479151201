"""The images of a run: their sizes, warnings about them, and the caches that are filled before training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from spectune.errors import InputError, counted
from spectune.model.network import Sdxl, no_vae
from spectune.model.vae.ways import ENCODE_ERRORS, EncodeWay
from spectune.sdxl.layout import Layout
from spectune.training.callbacks import Callbacks, stage
from spectune.training.data.buckets import Size
from spectune.training.data.dataset import Pictures
from spectune.training.data.latents import encode_pictures, vae_key
from spectune.training.data.plan import BatchPlan
from spectune.training.data.scan import Scan
from spectune.training.data.store import LatentStore
from spectune.training.denoiser import Denoiser, encode_captions
from spectune.training.recipe.recipe import Recipe
from spectune.training.validation import ValidationImages

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
        trained, validated = ({image.path.resolve() for image in one.images} for one in (scan, validation))
        if shared := trained & validated:
            warnings.append(
                f"{counted(len(shared), 'validation image')} also used for training: "
                "the validation loss does not tell how well the model predicts new images"
            )
    if enlarged := pictures.enlarged():
        warnings.append(f"{counted(enlarged, 'image')} enlarged to the training size")
    return [*warnings, *crop_warnings(pictures, has_buckets=has_buckets)]


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


def cache_latents(
    recipe: Recipe, model: Sdxl, way: EncodeWay, pictures: Pictures, callbacks: Callbacks
) -> list[str]:
    """Encode the images if the recipe caches latents; return warnings. `model` encodes in the given way.

    Raises:
        LatentsNotFiniteError: Latents are not finite.
    """
    if not recipe.caches_latents:
        return []
    callbacks.on_message(f"encoding {counted(len(pictures), 'image')}: {described_way(way)}")
    folder = recipe.data.cache_folder
    store = None
    if folder is not None:
        assert model.layout.vae is not None
        # an AutoencoderDC has no deviations
        store = LatentStore(folder, vae_key(model), has_deviations=model.layout.vae.deep_config is None)
    with stage(callbacks, "encoding images") as progressed:
        pictures.latents = encode_pictures(
            model,
            pictures,
            flips=pictures.variation.flips,
            seed=recipe.run.seed,
            progress=progressed,
            store=store,
        )
    return [] if store is None else store.warnings()


def described_way(way: EncodeWay) -> str:
    """Return a way to encode with its error."""
    return f"{'in tiles' if way == 'tiles' else way} ({ENCODE_ERRORS[way]})"


def cache_captions(
    recipe: Recipe,
    denoiser: Denoiser,
    pictures: Pictures,
    validation: Sequence[ValidationImages],
    callbacks: Callbacks,
) -> None:
    """Encode the captions if the recipe caches them."""
    if recipe.caches_text:
        captions = {image.caption for image in pictures.images} | {""}
        captions = captions.union(*(group.captions for group in validation))
        with stage(callbacks, "encoding captions") as progressed:
            denoiser.text = encode_captions(
                denoiser.model, captions, max_tokens=denoiser.max_tokens, progress=progressed
            )


def data_hash(pictures: Pictures) -> str:
    """Return a hash of the images' names, captions, repeats, sizes, weights and masks."""
    listed = [
        (
            image.path.name,
            image.text,
            image.repeats,
            image.size,
            placement.target,
            image.weight,
            image.mask and image.mask.name,
        )
        for image, placement in zip(pictures.images, pictures.placements, strict=True)
    ]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def batch_warnings(recipe: Recipe, plan: BatchPlan) -> list[str]:
    """Return a warning if batches of one image meet options that use the other images of a batch."""
    uses_others = recipe.objective.flow_pairing != "random" or recipe.loss.contrastive_weight
    if not uses_others or not plan.batches_of_one:
        return []
    return [
        f"each epoch has {counted(plan.batches_of_one, 'batch', 'batches')} with one image: "
        "objective.flow_pairing and loss.contrastive_weight do nothing there"
    ]
