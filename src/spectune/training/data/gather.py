"""From the data section of a recipe to pictures, and what of them is encoded before the training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import partial

from spectune.errors import InputError
from spectune.model.network import Sdxl
from spectune.training.callbacks import Callbacks
from spectune.training.data.buckets import Size, bucket_sizes
from spectune.training.data.captions import CaptionRules
from spectune.training.data.dataset import Pictures, Variation
from spectune.training.data.folders import FilesBeside, ImageSet, Scan, scan_data, scan_held_out
from spectune.training.data.latents import encode_pictures, vae_key
from spectune.training.data.store import LatentStore
from spectune.training.denoiser import Denoiser, encode_captions
from spectune.training.recipe.recipe import Recipe
from spectune.training.recipe.sections.data import DataSection
from spectune.training.validation import HeldOut


def training_sizes(data: DataSection) -> tuple[Size, ...]:
    """The sizes in pixels that images are trained at."""
    bucket = data.bucket
    if not bucket.enabled:
        return (Size(data.resolution_px, data.resolution_px),)
    return bucket_sizes(data.resolution_px, minimum=bucket.min_px, maximum=bucket.max_px, step=bucket.step_px)


def scan_training(data: DataSection) -> Scan:
    """What the recipe's folders and sets hold."""
    sets = [ImageSet(**dict(section)) for section in data.sets]
    beside = FilesBeside(data.caption.extensions, data.caption.sidecar, data.mask, data.mask_suffix)
    return scan_data(
        data.folders,
        sets,
        regularisation_parents=data.regularisation_folders,
        regularisation_weight=data.regularisation_weight,
        beside=beside,
    )


def scan_validation(data: DataSection) -> Scan | None:
    """What the recipe's folder of held-out images holds, if it names one."""
    if data.validation_folder is None:
        return None
    return scan_held_out(
        data.validation_folder,
        data.caption.extensions,
        sidecar=data.caption.sidecar,
        mask_suffix=data.mask_suffix,
    )


def variation(data: DataSection) -> Variation:
    caption = data.caption
    return Variation(
        captions=CaptionRules(
            caption.shuffle, caption.keep_tokens, caption.dropout_probability, caption.tag_dropout_probability
        ),
        flip_probability=data.flip_probability,
        random_crop=data.random_crop,
        color_probability=data.color_probability,
        cached_variants=data.cache_variants,
    )


def data_warnings(scan: Scan, pictures: Pictures, held_out: Scan | None) -> list[str]:
    found = scan.warnings()
    if held_out is not None:
        found += [f"held-out: {warning}" for warning in held_out.warnings()]
        shared = {image.path.resolve() for image in scan.images} & {
            image.path.resolve() for image in held_out.images
        }
        if shared:
            found.append(
                f"{len(shared)} held-out images are also trained on: their loss says nothing about new images"
            )
    if enlarged := pictures.enlarged():
        found.append(f"{len(enlarged)} images are smaller than their training size and are enlarged")
    return found


def check_sizes(model: Sdxl, sizes: Iterable[Size]) -> None:
    step = model.pixels_per_latent * 2 ** (len(model.layout.unet.channels) - 1)
    for size in sizes:
        if size.width % step or size.height % step:
            raise InputError(
                f"training size {size.width}x{size.height}: this model needs multiples of {step} pixels",
                hint="change data.resolution_px or data.bucket.step_px",
            )


def fill_caches(
    recipe: Recipe,
    model: Sdxl,
    denoiser: Denoiser,
    pictures: Pictures,
    held_out: Sequence[HeldOut],
    hear: Callbacks,
) -> list[str]:
    """Encode what is encoded once; warnings."""
    warnings: list[str] = []
    if recipe.caches_latents:
        hear.on_message(f"encoding {len(pictures)} images")
        stage, folder = "encoding images", recipe.data.cache_folder
        store = None if folder is None else LatentStore(folder, vae_key(model))
        try:
            pictures.latents = encode_pictures(
                model,
                pictures,
                flips=pictures.variation.flips,
                seed=recipe.run.seed,
                progress=partial(hear.on_progress, stage),
                store=store,
            )
        finally:
            # also after an error: a progress bar must give the terminal back
            hear.on_progress(stage, 1, 1)
        warnings = [] if store is None else store.warnings()
        for warning in warnings:
            hear.on_message(f"warning: {warning}")
    if recipe.caches_text:
        captions = {image.caption for image in pictures.images} | {""}
        denoiser.text = encode_captions(model, captions.union(*(group.captions for group in held_out)))
    return warnings


def data_hash(pictures: Pictures) -> str:
    listed = [
        (
            image.path.name,
            image.caption,
            image.repeats,
            image.size,
            target,
            image.weight,
            image.mask and image.mask.name,
        )
        for image, target in zip(pictures.images, pictures.targets, strict=True)
    ]
    return hashlib.sha256(repr(listed).encode()).hexdigest()
