"""Find the layers of a loaded MODEL and CLIP, and patch low-rank products onto their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from comfy.weight_adapter import LoRAAdapter

from spectune.core.low_rank import LowRank
from spectune.errors import some_of
from spectune.files.source import MemorySource
from spectune.sdxl.layers import Catalogue, build_catalogue
from spectune.sdxl.layout import SDXL, TextLayout
from spectune.sdxl.names import Module, te1_modules, te2_modules

Shapes = Mapping[str, tuple[int, ...]]
LABEL = "the connected MODEL and CLIP"

# Part -> root in ComfyUI's state dicts: te1.text_model.x is clip_l.transformer.text_model.x
ROOTS: Mapping[str, str] = {
    "unet": "diffusion_model",
    "te1": "clip_l.transformer",
    "te2": "clip_g.transformer",
}


def patch_key(layer: str) -> str:
    """Return the key of a layer's weight in the state dict of ComfyUI's MODEL or CLIP."""
    part, _, rest = layer.partition(".")
    return f"{ROOTS[part]}.{rest}.weight"


def catalogue_of(model: Any, clip: Any) -> Catalogue:
    """Return the layers of a loaded SDXL, from the names and shapes of its weights.

    Raises:
        InputError: The model is not an SDXL.
    """
    shapes = _shapes(model.model.state_dict()) | _shapes(clip.patcher.model.state_dict())
    tensors = {name: torch.empty(shape, device="meta") for name, shape in single_file_shapes(shapes).items()}
    return build_catalogue(MemorySource(tensors, {}, LABEL), all_layers=True)


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in state.items()}


def single_file_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Convert ComfyUI's shapes to those of a checkpoint, which joins q, k, v of the second encoder."""
    result = {f"model.{name}": shape for name, shape in shapes.items() if name.startswith("diffusion_model.")}
    result |= _text_shapes(
        te1_modules(_sized(SDXL.te1, shapes, "clip_l")), "clip_l.transformer.text_model", shapes
    )
    return result | _text_shapes(
        te2_modules(_sized(SDXL.te2, shapes, "clip_g")), "clip_g.transformer", shapes
    )


def _sized(text: TextLayout, shapes: Shapes, encoder: str) -> TextLayout:
    """Return a text layout with the width and depth of ComfyUI's encoder, 0 if it is absent."""
    root = f"{encoder}.transformer.text_model"
    depth = sum(1 for n in range(999) if f"{root}.encoder.layers.{n}.mlp.fc1.weight" in shapes)
    width = shapes.get(f"{root}.embeddings.token_embedding.weight", (0, 0))[1]
    return replace(text, width=width, layers=depth)


def _text_shapes(modules: Iterable[Module], root: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    result: dict[str, tuple[int, ...]] = {}
    for module in modules:
        for parameter, view in module.parameters:
            shape = shapes.get(f"{root}.{module.path}.{parameter}")
            if shape is None:
                continue
            if view.rows is not None:
                shape = (shape[0] + result.get(view.tensor, (0,))[0], *shape[1:])
            result[view.tensor] = shape[::-1] if view.transpose else shape
    return result


def patched(
    model: Any,
    clip: Any,
    changes: Mapping[str, LowRank],
    *,
    strength_model: float = 1,
    strength_clip: float = 1,
) -> tuple[Any, Any]:
    """Return copies of MODEL and CLIP with a patch for each layer, which ComfyUI adds to the weights.

    ComfyUI sums in float32 on the CPU, and on a GPU if it is configured for it.

    Raises:
        RuntimeError: A layer has no weight in MODEL or CLIP.
    """
    model, clip = model.clone(), clip.clone()
    patches = {patch_key(name): adapter_of(low_rank) for name, low_rank in changes.items()}
    unet = {key: patch for key, patch in patches.items() if key.startswith("diffusion_model.")}
    text = {key: patch for key, patch in patches.items() if key not in unet}
    patched_keys = {*_added(model, unet, strength_model), *_added(clip, text, strength_clip)}
    missing = sorted(patches.keys() - patched_keys)
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(patches)} layers have no weight in {LABEL}: {some_of(missing)}\n"
            "hint: the files belong to another model; connect the model they were made from"
        )
    return model, clip


def adapter_of(low_rank: LowRank) -> LoRAAdapter:
    """Return the factors of a layer as a ComfyUI patch."""
    return LoRAAdapter(set(), (low_rank.up, low_rank.down, low_rank.alpha, None, None, None))


def _added(patcher: Any, patches: Mapping[str, LoRAAdapter], strength: float) -> Iterator[str]:
    yield from patcher.add_patches(dict(patches), strength) if patches else ()
