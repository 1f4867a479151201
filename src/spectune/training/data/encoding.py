"""Encode the images of a run in the way of its recipe, or as exactly as the memory allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from accelerate.utils import gather_object

from spectune.model.device import free_bytes
from spectune.model.network import Sdxl
from spectune.model.vae.encoding import ENCODE_WAYS, encoder_of, encoding_bytes, most_exact_way
from spectune.model.vae.ways import ENCODE_ERRORS, EncodeWay
from spectune.training.callbacks import WarningLog, stage
from spectune.training.data.buckets import training_buckets, training_sizes
from spectune.training.data.cache.caches import cache_latents
from spectune.training.data.dataset import Pictures
from spectune.training.data.latents import LatentsNotFiniteError, images_per_call
from spectune.training.data.scan import Scan
from spectune.training.recipe.recipe import Recipe, parse_recipe
from spectune.training.validation import ValidationImages, encode_validation


def with_saved_way(recipe: Recipe, saved: Mapping[str, Any]) -> Recipe:
    """Return a recipe that encodes as a saved one did, unless it names its own way."""
    if recipe.vae.encode != "auto":
        return recipe
    data = recipe.model_dump()
    data["vae"]["encode"] = saved["vae"]["encode"]
    return parse_recipe(data, label="the recipe of the saved state")


def with_way(recipe: Recipe, way: EncodeWay) -> Recipe:
    """Return the recipe with a way to encode."""
    return recipe.model_copy(update={"vae": recipe.vae.model_copy(update={"encode": way})})


def encode_images(
    recipe: Recipe, model: Sdxl, pictures: Pictures, validation: Scan | None, warnings: WarningLog
) -> tuple[EncodeWay, list[ValidationImages]]:
    """Encode the validation images and fill the cache of latents; return the way and the validation images.

    The autoencoder must be on its device. `auto` takes the most exact way that fits into the free memory, the
    same on all processes. If bfloat16 gives values that are not finite, all images are encoded in tiles.

    Raises:
        InputError: Latents are not finite.
    """

    def encoded(way: EncodeWay) -> list[ValidationImages]:
        encoder = encoder_of(model, way)
        buckets = training_buckets(recipe.data)[-1]
        groups: list[ValidationImages] = []
        if validation is not None:
            with stage(warnings.callbacks, "encoding validation images") as progressed:
                groups = encode_validation(encoder, validation, buckets, progress=progressed)
        warnings.add(cache_latents(recipe, encoder, way, pictures, warnings.callbacks))
        return groups

    if recipe.vae.encode != "auto":
        return recipe.vae.encode, encoded(recipe.vae.encode)
    way = _way_within_memory(recipe, model, warnings)
    try:
        groups = encoded(way)
        finite = way
    except LatentsNotFiniteError:
        if way != "bfloat16":
            raise
        groups, finite = [], "tiles"
    agreed = _least_exact(finite)
    if agreed != way:
        warnings.add(
            [f"latents are not finite in bfloat16: all images are encoded in tiles ({ENCODE_ERRORS[agreed]})"]
        )
        groups = encoded(agreed)
    return agreed, groups


def _way_within_memory(recipe: Recipe, model: Sdxl, warnings: WarningLog) -> EncodeWay:
    assert model.vae is not None
    assert model.layout.vae is not None
    # The cached images of a run are encoded before the other networks are on the device.
    reserved = 0 if recipe.caches_latents else _bytes_to_come(recipe, model)
    pixels = max(images_per_call(size) * size.width * size.height for size in training_sizes(recipe.data))
    way = _least_exact(most_exact_way(model, pixels, reserved=reserved))
    if way != "float32":
        needed, free = encoding_bytes(model.layout.vae, pixels), free_bytes(model.vae.device) or 0
        warnings.add(
            [
                f"images are encoded in {way} ({ENCODE_ERRORS[way]}), because float32 needs "
                f"{needed / 1e9:.1f} GB and {max(free - reserved, 0) / 1e9:.1f} GB are free; the state keeps "
                f'this choice, and vae.encode = "{way}" makes it independent of the free memory'
            ]
        )
    return way


def _bytes_to_come(recipe: Recipe, model: Sdxl) -> int:
    """Return the bytes that networks, gradients and optimizer will still take on the device."""
    assert model.vae is not None
    device = model.vae.device
    networks = (model.unet,) if "text" in recipe.run.offload else (model.unet, model.te1, model.te2)
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return sum(
        (parameter.nbytes if parameter.device != device else 0)
        + (3 * parameter.nbytes if parameter.requires_grad else 0)  # a gradient and two moments
        for parameter in parameters
    )


def _least_exact(way: EncodeWay) -> EncodeWay:
    """Return the least exact way of all processes, so that all have the same latents."""
    ways = cast("list[int]", gather_object([ENCODE_WAYS.index(way)]))
    return ENCODE_WAYS[max(ways)]
