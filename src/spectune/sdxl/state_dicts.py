"""Map a single file's tensors to the state dicts of SDXL's running modules, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.errors import InputError, counted, some_of
from spectune.files.source import WeightSource
from spectune.sdxl.layout import (
    PARTS,
    TE1_ROOT,
    TE1_SHORT_ROOT,
    TE2_ROOT,
    UNET_ROOT,
    VAE_ROOT,
    Layout,
    PartLayouts,
    PartName,
    require,
)
from spectune.sdxl.names import Module, TensorView, modules_of

LOGIT_SCALE = 4.605170185988092  # ln 100, the upper limit in CLIP's training; SDXL does not use it

_ROOTS: Mapping[PartName, tuple[str, ...]] = {
    "unet": (UNET_ROOT,),
    "te1": (TE1_ROOT,),
    "te2": (TE2_ROOT,),
    "vae": (f"{VAE_ROOT}encoder.", f"{VAE_ROOT}decoder."),
}
_UNUSED = frozenset(
    {
        f"{TE1_ROOT}embeddings.position_ids",
        f"{TE2_ROOT}logit_scale",
        # Present if the file contains all of CLIP; SDXL uses only the hidden states of the first encoder.
        f"{TE1_SHORT_ROOT}logit_scale",
        f"{TE1_SHORT_ROOT}text_projection.weight",
    }
)


@dataclass(frozen=True)
class Piece:
    """A parameter of a part: its key in the state dict and its view of a single-file tensor."""

    part: PartName
    key: str
    view: TensorView

    @property
    def first_row(self) -> int:
        return 0 if self.view.rows is None else self.view.rows[0]


def views_of(modules: Iterable[Module]) -> dict[str, TensorView]:
    """Return the state dict of these modules as views of single-file tensors."""
    return {f"{module.path}.{name}": view for module in modules for name, view in module.parameters}


def state_views(layout: PartLayouts, part: PartName) -> dict[str, TensorView]:
    """Return the state dict of a part as views of single-file tensors; empty without the part."""
    return views_of(modules_of(layout, part))


def module_tensors(layout: Layout, part: PartName, source: WeightSource) -> Mapping[str, TensorView]:
    """Return the state dict of a part as views of the tensors of `source`, a single file.

    Raises:
        InputError: Tensors of the part are missing, or the file has tensors that the part lacks.
    """
    views = state_views(layout, part)
    if not views:
        raise InputError(f"{source.label} has no {part}", hint="pass a checkpoint that contains this part")
    needed = {view.tensor for view in views.values()}
    require(source.tensors, sorted(needed), source.label)
    surplus = [
        name for name in source.tensors if name.startswith(_ROOTS[part]) and name not in needed | _UNUSED
    ]
    refuse_surplus(surplus, source.label, f"the {part}")
    return views


def refuse_surplus(names: Sequence[str], label: str, model: str) -> None:
    """Raise InputError if `names` is not empty: the names of tensors that `model` lacks."""
    if names:
        raise InputError(
            f"{label} has {counted(len(names), 'tensor')} without a counterpart in {model}: {some_of(names)}",
            hint="the model has layers that SDXL lacks, and would run without them: use a plain SDXL",
        )


def single_file_tensors(
    layout: Layout,
    unet_state: Mapping[str, Tensor],
    te1_state: Mapping[str, Tensor],
    te2_state: Mapping[str, Tensor],
    vae_state: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Return the tensors of a single file from the state dicts of the parts; inverse of `module_tensors`.

    Fuses q, k, v of the second encoder. Adds `position_ids` and `logit_scale`, which belong to no module.
    """
    # some versions of transformers add the prefix `text_model.`
    te1_state = {key.removeprefix("text_model."): tensor for key, tensor in te1_state.items()}
    states = {"unet": unet_state, "te1": te1_state, "te2": te2_state, "vae": vae_state or {}}
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        views, state = state_views(layout, part), states[part]
        different = views.keys() ^ (state.keys() - {"embeddings.position_ids"})
        assert not different, f"{part}: {some_of(sorted(different))}"
        for name, pieces in pieces_by_tensor(part, views).items():
            tensors[name] = joined(pieces, [state[piece.key] for piece in pieces])
    tensors[f"{TE1_ROOT}embeddings.position_ids"] = torch.arange(layout.te1.context)[None]
    tensors[f"{TE2_ROOT}logit_scale"] = torch.full_like(tensors[f"{TE2_ROOT}ln_final.weight"][0], LOGIT_SCALE)
    return dict(sorted(tensors.items()))


def pieces_by_tensor(part: PartName, views: Mapping[str, TensorView]) -> dict[str, tuple[Piece, ...]]:
    """Return the pieces of each single-file tensor in row order: one, or three if q, k, v are fused."""
    pieces: dict[str, list[Piece]] = {}
    for key, view in views.items():
        pieces.setdefault(view.tensor, []).append(Piece(part, key, view))
    return {name: tuple(sorted(rows, key=lambda piece: piece.first_row)) for name, rows in pieces.items()}


def joined(pieces: Sequence[Piece], parameters: Sequence[Tensor], *, matrix: bool = False) -> Tensor:
    """Join parameters to a single-file tensor; the inverse of reading the views of `pieces`.

    Also works on meta tensors. `matrix` flattens a 1x1 convolution to a matrix.
    """
    blocks = [piece.view.written(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]
    if matrix:
        blocks = [block.flatten(1) for block in blocks]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0].contiguous()
