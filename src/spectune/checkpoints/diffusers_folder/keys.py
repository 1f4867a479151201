"""Where the tensors of a single file stand in a diffusers folder, and under which keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectune.sdxl.layout import TE1_ROOT, TE1_SHORT_ROOT, TE2_ROOT
from spectune.sdxl.names import LOGIT_SCALE, ModuleName, TensorView

PARTS: tuple[ModuleName, ...] = ("unet", "te1", "te2", "vae")
SUBFOLDERS: Mapping[ModuleName, str] = {
    "unet": "unet",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "vae": "vae",
}
STEMS: Mapping[ModuleName, str] = {
    "unet": "diffusion_pytorch_model",
    "te1": "model",
    "te2": "model",
    "vae": "diffusion_pytorch_model",
}

# What a single file has and no module holds, where it is not what `derived_tensors` gives.
EXTRAS_FILE = "single_file_extras.safetensors"
MATRICES_KEY = "spectune.matrices"  # its metadata: attention weights of the VAE that the file has as matrices
TE1_ROOT_KEY = "spectune.te1_root"  # its metadata: what the first encoder's tensors begin with

_TEXT = "text_model."
_POSITIONS = "embeddings.position_ids"
# saved with the whole CLIP, of which SDXL takes the first encoder's hidden states only
_TE1_UNUSED = ("text_projection.weight", "logit_scale")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Piece:
    """A tensor of a subfolder: its key in the module's state dict, as a view of a single-file tensor."""

    part: ModuleName
    key: str
    view: TensorView


def pieces_by_tensor(part: ModuleName, views: Mapping[str, TensorView]) -> dict[str, tuple[Piece, ...]]:
    """The pieces of each single-file tensor in the order of its rows: one, or three if q, k, v are fused."""
    found: dict[str, list[Piece]] = {}
    for key, view in views.items():
        found.setdefault(view.tensor, []).append(Piece(part, key, view))
    return {tensor: tuple(sorted(pieces, key=_first_row)) for tensor, pieces in found.items()}


def joined(pieces: Sequence[Piece], parameters: Sequence[Tensor], *, matrix: bool = False) -> Tensor:
    """The single-file tensor that the parameters of `pieces` make; the inverse of reading their views.

    Works on meta tensors too. A 1x1 convolution becomes a matrix where `matrix` says so.
    """
    blocks = [piece.view.written(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]
    if matrix:
        blocks = [block.flatten(1) for block in blocks]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0].contiguous()


def file_key(part: ModuleName, key: str) -> str:
    """How a key of a state dict is spelled on disk, where both text encoders have `text_model.`."""
    return f"{_TEXT}{key}" if part == "te1" else key


def state_key(part: ModuleName, key: str) -> str:
    """The inverse of file_key, of any version's spelling."""
    if part == "te1":
        return key.removeprefix(_TEXT)
    if part == "te2" and key.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        return f"{_TEXT}{key}"
    if part == "vae" and ".attentions." in key:
        stem, _, parameter = key.rpartition(".")
        parent, _, axis = stem.rpartition(".")
        return f"{parent}.{_OLD_ATTENTION.get(axis, axis)}.{parameter}" if parent else key
    return key


def is_positions(part: ModuleName, key: str) -> bool:
    """Whether a state-dict key is the counter that older versions of transformers save with the weights."""
    return {"te1": _POSITIONS, "te2": f"{_TEXT}{_POSITIONS}"}.get(part) == key


def loose_name(part: ModuleName, key: str) -> str | None:
    """The single-file name of a tensor that stands in a subfolder and in no module, if it has one."""
    if part == "te1" and key in _TE1_UNUSED:
        return f"{TE1_SHORT_ROOT}{key}"
    return f"{TE2_ROOT}logit_scale" if (part, key) == ("te2", "logit_scale") else None


def derived_tensors(
    context: int, dtype: torch.dtype, *, v_prediction: bool, zero_snr: bool
) -> dict[str, Tensor]:
    """What a single file has beside the modules, as far as it follows from what a folder says.

    The counter of the first encoder's `context` positions and the second's temperature in `dtype`, as
    names.single_file_tensors writes them; the empty markers by which other programs know v-prediction and
    a schedule that ends in pure noise.
    """
    tensors = {
        f"{TE1_ROOT}{_POSITIONS}": torch.arange(context)[None],
        f"{TE2_ROOT}logit_scale": torch.full((), LOGIT_SCALE, dtype=torch.float64).to(dtype),
    }
    markers = {"v_pred": v_prediction, "ztsnr": zero_snr}
    return tensors | {name: torch.empty(0) for name, present in markers.items() if present}


def _first_row(piece: Piece) -> int:
    return 0 if piece.view.rows is None else piece.view.rows[0]
