"""Map the tensors of a single file to the subfolders, files and keys of a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spectune.files.provenance import V_KEY, ZERO_SNR_KEY
from spectune.sdxl.layout import TE1_ROOT, TE1_SHORT_ROOT, TE2_ROOT, PartName
from spectune.sdxl.state_dicts import LOGIT_SCALE

SUBFOLDERS: Mapping[PartName, str] = {
    "unet": "unet",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "vae": "vae",
}
STEMS: Mapping[PartName, str] = {
    "unet": "diffusion_pytorch_model",
    "te1": "model",
    "te2": "model",
    "vae": "diffusion_pytorch_model",
}

# Stores the tensors of a single file that belong to no module and differ from `derived_tensors`.
EXTRAS_FILE = "single_file_extras.safetensors"
MATRICES_KEY = "spectune.matrices"  # metadata of that file: VAE attention weights that were matrices

_TEXT = "text_model."
_POSITIONS = "embeddings.position_ids"
# Present if the file contains all of CLIP; SDXL uses only the hidden states of the first encoder.
_TE1_UNUSED = ("text_projection.weight", "logit_scale")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def file_key(part: PartName, key: str) -> str:
    """Return the key on disk of a state-dict key; on disk, both encoders have the prefix `text_model.`."""
    return f"{_TEXT}{key}" if part == "te1" else key


def state_key(part: PartName, key: str) -> str:
    """Return the state-dict key of a key on disk, written by any version; the inverse of `file_key`."""
    if part == "te1":
        return key.removeprefix(_TEXT)
    if part == "te2" and key.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        return f"{_TEXT}{key}"
    if part == "vae" and ".attentions." in key:
        stem, _, parameter = key.rpartition(".")
        parent, _, axis = stem.rpartition(".")
        return f"{parent}.{_OLD_ATTENTION.get(axis, axis)}.{parameter}" if parent else key
    return key


def is_positions(part: PartName, key: str) -> bool:
    """Return whether a state-dict key is the `position_ids` buffer that older transformers versions save."""
    return {"te1": _POSITIONS, "te2": f"{_TEXT}{_POSITIONS}"}.get(part) == key


def loose_name(part: PartName, key: str) -> str | None:
    """Return the single-file name of a subfolder's tensor that belongs to no module, or None."""
    if part == "te1" and key in _TE1_UNUSED:
        return f"{TE1_SHORT_ROOT}{key}"
    return f"{TE2_ROOT}logit_scale" if (part, key) == ("te2", "logit_scale") else None


def derived_tensors(
    context: int, dtype: torch.dtype, *, v_prediction: bool, zero_snr: bool
) -> dict[str, Tensor]:
    """Return the tensors of a single file that belong to no module and follow from the configurations.

    They are the first encoder's `position_ids` (0 to `context` - 1) and the second's `logit_scale` in
    `dtype`, both as in `single_file_tensors`, and empty tensors that mark v-prediction and a schedule that
    ends in pure noise.
    """
    tensors = {
        f"{TE1_ROOT}{_POSITIONS}": torch.arange(context)[None],
        f"{TE2_ROOT}logit_scale": torch.full((), LOGIT_SCALE, dtype=torch.float64).to(dtype),
    }
    markers = {V_KEY: v_prediction, ZERO_SNR_KEY: zero_snr}
    return tensors | {name: torch.empty(0) for name, present in markers.items() if present}
