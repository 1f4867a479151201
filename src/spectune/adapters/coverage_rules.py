"""What can be special about a layer or a tensor, and what other programs do with it in adapters.

Read in the source of ComfyUI a125cd8 and sd-scripts 48d368f; LyCORIS 4.1.3 and diffusers 0.42.1 are asked
themselves by the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Program(StrEnum):
    """A program, and where it reads a file in two ways, which of them."""

    COMFYUI = "ComfyUI"
    SD_SCRIPTS = "sd-scripts"  # networks.lora, the network built from the file (--dim_from_weights, merging)
    LYCORIS = "LyCORIS training"  # network_weights into a network of preset=full
    LYCORIS_FILE = "LyCORIS from file"  # the network built from the file: merging
    DIFFUSERS = "diffusers"


class Fate(StrEnum):
    LOADS = "loads"
    IGNORES = "ignores"
    RAISES = "raises"  # and with it the whole file


@dataclass(frozen=True)
class Rule:
    """What a program does with a trait; a LOADS with a reason is worth a note."""

    fate: Fate
    reason: str = ""


class Trait(StrEnum):
    """What is special about a layer or a tensor; the plain case, a pair with alpha = rank, has none."""

    # of adapters: where the layer is
    EXTRA = "extra"  # not among the modules of preset=full
    PROJECTION = "projection"  # text_projection
    UNKNOWN_LAYER = "unknown_layer"
    # how it is spelled
    DIFFUSERS_SPELLING = "diffusers_spelling"  # lora_unet_down_blocks_...
    SGM_BESIDE_DIFFUSERS = "sgm_beside_diffusers"  # lora_unet_input_blocks_... in a file with the above
    PEFT_ATTENTION = "peft_attention"  # unet....attn1.to_q.lora_A.weight
    PEFT_OTHER = "peft_other"
    OLD_DIFFUSERS = "old_diffusers"  # unet....lora.down.weight
    KOHYA_BESIDE_OTHERS = "kohya_beside_others"  # lora_unet_... in a file with keys that begin otherwise
    # what its alpha is
    NO_ALPHA = "no_alpha"  # no layer of its part has one
    SOME_NO_ALPHA = "some_no_alpha"  # others of its part have one
    ALPHA_VARIES = "alpha_varies"  # an attention layer without the most frequent alpha of its part
    ALPHA_ROUNDED = "alpha_rounded"  # its 16-bit type cannot hold the rank
    ALPHA_NOT_RANK = "alpha_not_rank"
    # what it is instead of a pair
    DELTA = "delta"  # a tuned file of spectune
    LONE_DOWN = "lone_down"
    LONE_UP = "lone_up"
    OTHER_KIND = "other_kind"  # LoHa, LoKr, OFT, GLoRA, (IA)^3
    DIFF = "diff"  # the whole difference of a weight
    # what comes beside a pair
    DIFF_BESIDE = "diff_beside"
    DIFF_B = "diff_b"  # the difference of a bias
    NORM = "norm"  # the difference of a norm
    MID = "mid"
    DORA = "dora"
    UNKNOWN_KEY = "unknown_key"

    # of checkpoints
    EXTRA_KEY = "extra_key"  # outside UNet, encoders and VAE
    MARKER = "marker"  # v_pred, ztsnr
    SPARE = "spare"  # inside a part, and SDXL has no such tensor
    MISSING = "missing"
    NO_VAE = "no_vae"
    NO_ENCODER = "no_encoder"
    SHORT_TE1 = "short_te1"  # spelled without `text_model.`
    FOREIGN_SIZE = "foreign_size"
    RESIDUAL = "residual"
    FLOW = "flow"
    V_UNMARKED = "v_unmarked"  # v-prediction, said in metadata only


Rules = Mapping[Program, Rule]


def loads(reason: str = "") -> Rule:
    return Rule(Fate.LOADS, reason)


def ignores(reason: str) -> Rule:
    return Rule(Fate.IGNORES, reason)


def raises(reason: str) -> Rule:
    return Rule(Fate.RAISES, reason)


def adapter_rules(
    *,
    comfyui: Rule | None = None,
    sd_scripts: Rule | None = None,
    lycoris: Rule | None = None,
    lycoris_file: Rule | None = None,
    diffusers: Rule | None = None,
) -> Rules:
    """The row of a trait; a program that is not named loads it without a word."""
    return {
        Program.COMFYUI: comfyui or loads(),
        Program.SD_SCRIPTS: sd_scripts or loads(),
        Program.LYCORIS: lycoris or loads(),
        Program.LYCORIS_FILE: lycoris_file or loads(),
        Program.DIFFUSERS: diffusers or loads(),
    }


_NOT_TRAINED = ignores("no layer that it trains: time and label embedding, first and last convolution")
_NO_SUCH_LAYER = ignores("SDXL has no such layer")
_TRANSPOSED = loads("held transposed to what the checkpoint stores; leave it out of adapters")
_NOT_SGM = ignores("only lora_unet_ with sgm names, lora_te1_ and lora_te2_ are read")
_FROZEN_SCALE = loads("its scale is network_alpha / network_dim of the command line, not what the file says")
_TUNED = "trained deltas are no LoRA: `spectune export` writes one"
_WRONG_SCALE = loads("a 16-bit alpha cannot hold this rank, so the layer is scaled wrongly")
_LEFT_OVER = raises("keys that it cannot rename")
_HALF = "one of the two factors is missing"

ADAPTER_RULES: Mapping[Trait, Rules] = {
    Trait.EXTRA: adapter_rules(
        sd_scripts=_NOT_TRAINED,
        lycoris=_NOT_TRAINED,
        diffusers=loads("only since mid-2026; before, the file is refused"),
    ),
    Trait.PROJECTION: adapter_rules(
        comfyui=_TRANSPOSED,
        sd_scripts=ignores("no layer that it trains"),
        lycoris=ignores("no layer that it trains"),
        lycoris_file=_TRANSPOSED,
        diffusers=_TRANSPOSED,
    ),
    Trait.UNKNOWN_LAYER: adapter_rules(
        comfyui=_NO_SUCH_LAYER,
        sd_scripts=_NO_SUCH_LAYER,
        lycoris=_NO_SUCH_LAYER,
        lycoris_file=_NO_SUCH_LAYER,
        diffusers=_NO_SUCH_LAYER,
    ),
    Trait.DIFFUSERS_SPELLING: adapter_rules(
        sd_scripts=loads("renamed to sgm where the network is built from the file, else ignored"),
        lycoris=_NOT_SGM,
        lycoris_file=_NOT_SGM,
    ),
    Trait.SGM_BESIDE_DIFFUSERS: adapter_rules(
        sd_scripts=loads("can stop with an error in a file of both spellings, by the order of its keys"),
        diffusers=ignores("of a file with both spellings it drops the sgm layers"),
    ),
    Trait.PEFT_ATTENTION: adapter_rules(
        comfyui=ignores("to_q, to_k, to_v and to_out of PEFT are not mapped"),
        sd_scripts=_NOT_SGM,
        lycoris=_NOT_SGM,
        lycoris_file=_NOT_SGM,
    ),
    Trait.PEFT_OTHER: adapter_rules(sd_scripts=_NOT_SGM, lycoris=_NOT_SGM, lycoris_file=_NOT_SGM),
    Trait.OLD_DIFFUSERS: adapter_rules(diffusers=raises("it expects lora_A and lora_B in these names")),
    Trait.KOHYA_BESIDE_OTHERS: adapter_rules(
        diffusers=ignores("it renames kohya keys only in a file that has no others")
    ),
    Trait.NO_ALPHA: adapter_rules(
        comfyui=loads("without alpha it takes scale 1"),
        sd_scripts=loads("without alpha it takes alpha = rank, scale 1"),
        lycoris=_FROZEN_SCALE,
        lycoris_file=raises("it builds no layer without alpha"),
        diffusers=loads("without alpha it takes alpha = rank, scale 1"),
    ),
    Trait.SOME_NO_ALPHA: adapter_rules(
        comfyui=loads("without alpha it takes scale 1"),
        sd_scripts=loads("without alpha it takes alpha = rank, scale 1"),
        lycoris=_FROZEN_SCALE,
        lycoris_file=raises("it builds no layer without alpha"),
        diffusers=loads("without alpha it takes the most frequent alpha of the part"),
    ),
    Trait.ALPHA_VARIES: adapter_rules(
        diffusers=loads(
            "scaled wrongly: attention layers get the most frequent alpha of the part; "
            "in a copy of the file without any alphas the scale is 1"
        )
    ),
    Trait.ALPHA_ROUNDED: adapter_rules(
        comfyui=_WRONG_SCALE,
        sd_scripts=_WRONG_SCALE,
        lycoris=_FROZEN_SCALE,
        lycoris_file=_WRONG_SCALE,
        diffusers=_WRONG_SCALE,
    ),
    Trait.ALPHA_NOT_RANK: adapter_rules(lycoris=_FROZEN_SCALE),
    Trait.DELTA: adapter_rules(
        comfyui=ignores(_TUNED),
        sd_scripts=ignores(_TUNED),
        lycoris=ignores(_TUNED),
        lycoris_file=raises(_TUNED),
        diffusers=raises(_TUNED),
    ),
    Trait.LONE_DOWN: adapter_rules(
        comfyui=ignores(_HALF),
        sd_scripts=ignores(_HALF),
        lycoris=ignores(_HALF),
        lycoris_file=raises(_HALF),
        diffusers=raises(_HALF),
    ),
    Trait.LONE_UP: adapter_rules(
        comfyui=raises(_HALF),
        sd_scripts=ignores(_HALF),
        lycoris=ignores(_HALF),
        lycoris_file=raises(_HALF),
        diffusers=raises(_HALF),
    ),
    Trait.OTHER_KIND: adapter_rules(
        sd_scripts=ignores("only pairs are read"),
        lycoris=ignores("algo=locon trains only pairs"),
        diffusers=_LEFT_OVER,
    ),
    Trait.DIFF: adapter_rules(
        sd_scripts=ignores("only pairs are read"),
        lycoris=ignores("algo=locon trains only pairs"),
        diffusers=_LEFT_OVER,
    ),
    Trait.DIFF_BESIDE: adapter_rules(
        comfyui=loads("takes the place of the pair of the same layer"),
        sd_scripts=ignores("only pairs are read"),
        lycoris=ignores("algo=locon trains only pairs"),
        lycoris_file=ignores("a layer that has a pair is read as a pair"),
        diffusers=_LEFT_OVER,
    ),
    Trait.DIFF_B: adapter_rules(
        sd_scripts=ignores("biases are not read"),
        lycoris=ignores("algo=locon trains no biases"),
        lycoris_file=ignores("a layer that has a pair is read as a pair"),
        diffusers=_LEFT_OVER,
    ),
    Trait.NORM: adapter_rules(
        sd_scripts=ignores("norms are not read"),
        lycoris=ignores("train_norm=False"),
        diffusers=_LEFT_OVER,
    ),
    Trait.MID: adapter_rules(
        sd_scripts=loads("merges the layer wrongly, without a word"),
        lycoris=ignores("only with use_tucker=True"),
        diffusers=_LEFT_OVER,
    ),
    Trait.DORA: adapter_rules(
        sd_scripts=ignores("loads the pair without it, which is another layer"),
        lycoris=ignores("only with dora_wd=True"),
        diffusers=ignores("loads the pair without it, which is another layer"),
    ),
    Trait.UNKNOWN_KEY: adapter_rules(
        comfyui=ignores("no key that it knows"),
        sd_scripts=ignores("no key that it knows"),
        lycoris=ignores("no key that it knows"),
        lycoris_file=ignores("no key that it knows"),
        diffusers=_LEFT_OVER,
    ),
}
