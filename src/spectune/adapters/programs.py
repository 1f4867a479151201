"""The table of what each program loads from an adapter or a checkpoint.

The cells of ComfyUI (a125cd8) and sd-scripts (48d368f) come from their source code. Tests compare the cells
of LyCORIS 4.1.3 and diffusers 0.42.1 with what the libraries load.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from functools import partial
from typing import NamedTuple


class Program(StrEnum):
    """A program, and the way in which it loads a file if there are several."""

    COMFYUI = "ComfyUI"
    SD_SCRIPTS = "sd-scripts"  # networks.lora builds the network from the file: --dim_from_weights, merging
    LYCORIS = "LyCORIS training"  # network_weights loads the file into a network of preset=full
    LYCORIS_FILE = "LyCORIS from file"  # builds the network from the file: merging
    DIFFUSERS = "diffusers"


COMFYUI, SD_SCRIPTS, LYCORIS, LYCORIS_FILE, DIFFUSERS = ADAPTER_PROGRAMS = tuple(Program)
CHECKPOINT_PROGRAMS = (COMFYUI, SD_SCRIPTS, DIFFUSERS)  # LyCORIS leaves checkpoints to sd-scripts
_TRAINERS = (SD_SCRIPTS, LYCORIS)
_KOHYA_ONLY = (SD_SCRIPTS, LYCORIS, LYCORIS_FILE)


class Fate(StrEnum):
    """What a program does with a feature."""

    LOADS = "loads"  # but possibly not as intended
    IGNORES = "ignores"
    REFUSES = "refuses"  # the complete file


class Cell(NamedTuple):
    """What some programs do with a feature of a file, and why."""

    fate: Fate
    reason: str
    programs: tuple[Program, ...]


def _cell(fate: Fate, reason: str, *programs: Program) -> Cell:
    return Cell(fate, reason, programs)


_loads, _ignores, _refuses = (partial(_cell, fate) for fate in Fate)

_NOT_SGM = _ignores("reads only lora_unet_ with sgm names, lora_te1_ and lora_te2_", *_KOHYA_ONLY)
_NOT_RENAMED = _refuses("cannot rename these keys", DIFFUSERS)
_FIXED_SCALE = _loads("uses the scale network_alpha / network_dim of its command line", LYCORIS)
_SCALE_1 = _loads("uses scale 1 for a missing alpha", COMFYUI)
_BY_RANK = "uses alpha = rank (scale 1) for a missing alpha"
_NEEDS_ALPHA = _refuses("cannot build a layer without alpha", LYCORIS_FILE)
_NO_LORA = "trained deltas are not a LoRA: `spectune export` writes one"
_HALF = "one of the two factors is missing"
_PAIR_WINS = _ignores("reads only the pair of a layer that has one", LYCORIS_FILE)
_PAIRS = (_ignores("reads only pairs", SD_SCRIPTS), _ignores("algo=locon trains only pairs", LYCORIS))
_NEEDS_NODE = _loads("needs a separate loader node", COMFYUI)
_NEEDS_ARGUMENT = _refuses("must be passed to from_single_file", DIFFUSERS)
_EXACT = _refuses("the parts must have exactly SDXL's tensors", SD_SCRIPTS)
_SHORT_TE1 = "recognizes the first encoder only with `text_model.` in its names"


class Feature(Enum):
    """The rows of the table: what a file can contain.

    Programs that a row does not list load the feature as intended. A pair with alpha = rank, and a tensor of
    SDXL, have no feature.
    """

    # adapters: the layer
    EXTRA = (  # outside preset=full
        _ignores("does not train time and label embedding, first and last convolution", *_TRAINERS),
        _loads("only since mid-2026; older versions refuse the file", DIFFUSERS),
    )
    PROJECTION = (
        _ignores("does not train text_projection", *_TRAINERS),
        _loads("stores it transposed, unlike the checkpoint: leave it out", COMFYUI, LYCORIS_FILE, DIFFUSERS),
    )
    UNKNOWN_LAYER = (_ignores("SDXL has no such layer", *ADAPTER_PROGRAMS),)
    # its keys
    DIFFUSERS_NAMES = (  # lora_unet_down_blocks_...
        _loads("renames to sgm if it builds the network from the file, otherwise ignores", SD_SCRIPTS),
        _NOT_SGM._replace(programs=(LYCORIS, LYCORIS_FILE)),
    )
    SGM_WITH_DIFFUSERS = (  # lora_unet_input_blocks_... in a file with the above
        _loads("a file with both spellings can cause an error, depending on the order of keys", SD_SCRIPTS),
        _ignores("drops the sgm layers of a file with both spellings", DIFFUSERS),
    )
    PEFT = (_NOT_SGM,)  # also unet....processor.to_q_lora.down.weight
    PEFT_ATTENTION = (_ignores("does not map to_q, to_k, to_v and to_out of PEFT", COMFYUI), _NOT_SGM)
    PEFT_MODEL = (  # base_model.model.down_blocks....lora_A.weight
        _ignores("expects keys that begin with unet. or text_encoder", COMFYUI, DIFFUSERS),
        _NOT_SGM,
    )
    OLD_DIFFUSERS = (_refuses("expects lora_A and lora_B in these keys", DIFFUSERS),)  # .lora.down.weight
    COMFYUI_NAMES = (_NOT_SGM, _NOT_RENAMED)  # diffusion_model. and text_encoders.
    OTHER_SPELLING = (_ignores("not counted: this table does not cover these keys", *ADAPTER_PROGRAMS),)
    KOHYA_WITH_OTHERS = (_ignores("renames kohya keys only in a file without other keys", DIFFUSERS),)
    # its alpha
    NO_ALPHA = (_SCALE_1, _loads(_BY_RANK, SD_SCRIPTS, DIFFUSERS), _FIXED_SCALE, _NEEDS_ALPHA)
    SOME_NO_ALPHA = (  # other layers of the part have an alpha
        _SCALE_1,
        _loads(_BY_RANK, SD_SCRIPTS),
        _FIXED_SCALE,
        _NEEDS_ALPHA,
        _loads("uses the most frequent alpha of the part for a missing alpha", DIFFUSERS),
    )
    ALPHA_VARIES = (  # an attention layer whose alpha is not the most frequent one of its part
        _loads(
            "wrong scale: attention layers get the most frequent alpha of the part; "
            "a copy of the file without alphas gets scale 1",
            DIFFUSERS,
        ),
    )
    ALPHA_ROUNDED = (
        _loads(
            "wrong scale: a 16-bit alpha cannot hold this rank",
            *(COMFYUI, SD_SCRIPTS, LYCORIS_FILE, DIFFUSERS),
        ),
        _FIXED_SCALE,
    )
    ALPHA_NOT_RANK = (_FIXED_SCALE,)
    # instead of a pair
    DELTA = (
        _ignores(_NO_LORA, COMFYUI, SD_SCRIPTS, LYCORIS),
        _refuses(_NO_LORA, LYCORIS_FILE, DIFFUSERS),
    )
    LONE_DOWN = (_ignores(_HALF, COMFYUI, *_TRAINERS), _refuses(_HALF, LYCORIS_FILE, DIFFUSERS))
    LONE_UP = (_ignores(_HALF, *_TRAINERS), _refuses(_HALF, COMFYUI, LYCORIS_FILE, DIFFUSERS))
    OTHER_KIND = (*_PAIRS, _NOT_RENAMED)  # LoHa, LoKr, OFT, GLoRA, (IA)^3, the difference of a weight
    # in addition to a pair
    DIFF = (_loads("uses it instead of the pair of the layer", COMFYUI), *_PAIRS, _PAIR_WINS, _NOT_RENAMED)
    DIFF_B = (
        _ignores("reads no biases", SD_SCRIPTS),
        _ignores("algo=locon trains no biases", LYCORIS),
        _PAIR_WINS,
        _NOT_RENAMED,
    )
    NORM = (_ignores("reads no norms", SD_SCRIPTS), _ignores("train_norm=False", LYCORIS), _NOT_RENAMED)
    MID = (
        _loads("merges the layer wrongly, without an error", SD_SCRIPTS),
        _ignores("only with use_tucker=True", LYCORIS),
        _NOT_RENAMED,
    )
    DORA = (
        _ignores("loads the pair without it, which changes the layer", SD_SCRIPTS, DIFFUSERS),
        _ignores("only with dora_wd=True", LYCORIS),
    )
    UNKNOWN_KEY = (_ignores("does not know this key", COMFYUI, *_KOHYA_ONLY), _NOT_RENAMED)

    # checkpoints
    OUTSIDE = (_ignores("belongs to no part", *CHECKPOINT_PROGRAMS),)
    MARKER = (_ignores("the command line or the scheduler sets the prediction", SD_SCRIPTS, DIFFUSERS),)
    SURPLUS = (_ignores("SDXL has no such tensor", COMFYUI, DIFFUSERS), _EXACT)  # inside a part
    MISSING = (
        _loads("leaves a missing tensor uninitialized", COMFYUI),
        _EXACT,
        _refuses("leaves a missing tensor without values", DIFFUSERS),
    )
    NO_VAE = (
        _NEEDS_NODE,
        _refuses("requires the VAE of the checkpoint even if --vae gives another one", SD_SCRIPTS),
        _NEEDS_ARGUMENT,
    )
    NO_ENCODER = (_NEEDS_NODE, _EXACT, _NEEDS_ARGUMENT)
    SHORT_TE1 = (_ignores(_SHORT_TE1, COMFYUI), _refuses(_SHORT_TE1, SD_SCRIPTS, DIFFUSERS))
    OTHER_SIZE = (
        _refuses("loads only SDXL's widths and depths", COMFYUI, SD_SCRIPTS),
        _loads("needs a folder of configurations with these sizes", DIFFUSERS),
    )
    OTHER_LATENTS = (  # another number of channels, but not the mask of an inpainting model
        _loads(
            "takes it for an inpainting model with SDXL's latents: add the node Flow Sampling From File",
            COMFYUI,
        ),
        _refuses("its UNet has 4 latent channels", SD_SCRIPTS),
    )
    RESIDUAL = (_loads("a residual works only with its principal, at strength 1", *CHECKPOINT_PROGRAMS),)
    FLOW = (
        _loads("a file cannot declare flow: add ModelSamplingSD3 with its shift", COMFYUI),
        _loads("has no flow objective for SDXL", SD_SCRIPTS),
        _loads("a file cannot declare flow: pass a flow scheduler with its shift", DIFFUSERS),
    )
    V_UNMARKED = (  # declared in metadata only
        _loads("reads it as eps because the key v_pred is missing: add ModelSamplingDiscrete", COMFYUI),
        _loads("needs --v_parameterization", SD_SCRIPTS),
        _loads("needs prediction_type v_prediction in its scheduler", DIFFUSERS),
    )
