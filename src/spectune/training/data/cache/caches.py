"""What a run encodes before the training, and where it keeps the results: in memory, or latents on disk.

The limits depend on the images, captions and recipe only, never on the free memory: a run has the same
numbers on every computer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from spectune.errors import InputError, counted
from spectune.model.network import Sdxl, no_vae
from spectune.model.text import count_tokens
from spectune.model.vae.ways import ENCODE_ERRORS, EncodeWay
from spectune.sdxl.layout import Layout
from spectune.sdxl.vocabulary import CHUNK_TOKENS
from spectune.training.callbacks import Callbacks, stage
from spectune.training.data.cache.filling import fill_cache
from spectune.training.data.cache.store import LatentStore
from spectune.training.data.dataset import Pictures
from spectune.training.data.latents import encode_pictures, vae_key
from spectune.training.denoiser import Denoiser, encode_captions
from spectune.training.recipe.recipe import Recipe
from spectune.training.saving.disk import shown_size
from spectune.training.validation import ValidationImages

# Above these, latents are kept on disk, and captions are encoded at each step. Every process has both.
MOST_LATENT_BYTES = 4_000_000_000  # 15,000 views of 1024 px with 4 channels
MOST_TEXT_BYTES = 4_000_000_000  # 12,600 captions in bfloat16


def cache_latents(
    recipe: Recipe, model: Sdxl, way: EncodeWay, pictures: Pictures, callbacks: Callbacks
) -> list[str]:
    """Encode the images if the recipe caches latents; return warnings. `model` encodes in the given way.

    Raises:
        InputError: The disk is too full for the latents, or images changed since they were found.
        LatentsNotFiniteError: Latents are not finite.
    """
    if not recipe.caches_latents:
        return []
    callbacks.on_message(f"encoding {counted(len(pictures), 'image')}: {described_way(way)}")
    folder, seed = latent_folder(recipe, pictures, model.layout), recipe.run.seed
    if folder is None:
        with stage(callbacks, "encoding images") as progressed:
            pictures.latents = encode_pictures(model, pictures, seed=seed, progress=progressed)
        return []
    if recipe.data.cache_folder is None:
        callbacks.on_message(
            f"the latents take {shown_size(latent_bytes(pictures, model.layout))}: above "
            f"{MOST_LATENT_BYTES / 1e9:g} GB they are kept on disk, in {folder}; delete it after the training"
        )
    store = LatentStore(folder, vae_key(model))
    pictures.latents = fill_cache(model, pictures, store, seed=seed, callbacks=callbacks)
    return store.warnings()


def latent_folder(recipe: Recipe, pictures: Pictures, layout: Layout) -> Path | None:
    """Return the folder of the latents of a run that caches them, None if they stay in memory."""
    if recipe.data.cache_folder is not None or latent_bytes(pictures, layout) <= MOST_LATENT_BYTES:
        return recipe.data.cache_folder
    return recipe.run.output / f"{recipe.run.name}.latents"


def latent_bytes(pictures: Pictures, layout: Layout) -> int:
    """Return the bytes of the latents of all cached views in float32, or of their posteriors in bfloat16."""
    if layout.vae is None:
        raise no_vae()
    step = layout.vae.pixels_per_latent
    latents = sum(
        len(images) * (size.height // step) * (size.width // step)
        for size, images in pictures.placements.by_target().items()
    )
    return 4 * layout.vae.unet_channels * latents * pictures.views_per_image


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
    """Encode the captions if the recipe caches them, and if they fit below the limit.

    `data.cache_text = true` keeps them without a limit.

    Raises:
        InputError: They do not fit, but the text encoders are offloaded.
    """
    if not recipe.caches_text:
        return
    is_limited = recipe.data.cache_text is None
    captions = {"", *(caption for group in validation for caption in group.captions)}
    for image in pictures.images:
        captions.add(image.caption)
        if is_limited and len(captions) * _chunk_bytes(denoiser) > MOST_TEXT_BYTES:
            break  # millions of captions do not fit in memory
    nbytes = text_bytes(denoiser, captions)
    if nbytes > MOST_TEXT_BYTES:
        more = " or more" if is_limited else ""
        size = f"{counted(len(captions), 'caption')} take {shown_size(nbytes)}{more} when they are encoded"
        limit = f"above {MOST_TEXT_BYTES / 1e9:g} GB"
        if is_limited and "text" in recipe.run.offload:
            raise InputError(
                f'{size}: {limit} they are not kept, but run.offload = ["text"] needs them',
                hint="data.cache_text = true keeps them in main memory; or remove text from run.offload",
            )
        if is_limited:
            callbacks.on_message(
                f"{size}: {limit}, each step encodes its own; data.cache_text = true keeps them"
            )
            return
        callbacks.on_message(f"{size}, in the main memory of each process: data.cache_text is true")
    with stage(callbacks, "encoding captions") as progressed:
        denoiser.text = encode_captions(
            denoiser.model, captions, max_tokens=denoiser.max_tokens, progress=progressed
        )


def text_bytes(denoiser: Denoiser, captions: Collection[str]) -> int:
    """Return the bytes of encoded captions: at least a chunk of 75 tokens each, exact below the limit."""
    most, layout = denoiser.max_tokens // CHUNK_TOKENS, denoiser.model.layout
    chunks = len(captions)
    if most > 1 and chunks * _chunk_bytes(denoiser) <= MOST_TEXT_BYTES:
        counts = count_tokens(list(captions))
        chunks = sum(min(most, max(1, -(-count // CHUNK_TOKENS))) for count in counts)
    pooled = denoiser.model.te2.dtype.itemsize * (layout.te2.projection or 0)
    return chunks * _chunk_bytes(denoiser) + len(captions) * pooled


def _chunk_bytes(denoiser: Denoiser) -> int:
    layout = denoiser.model.layout
    return denoiser.model.te1.dtype.itemsize * layout.te1.context * (layout.te1.width + layout.te2.width)
