"""The flags of sd-scripts for the model, the network and the autoencoder."""

from __future__ import annotations

import re
from collections.abc import Mapping

from spectune.errors import did_you_mean
from spectune.interop.kohya import derived
from spectune.interop.kohya.command_line import Command, Flag
from spectune.interop.kohya.rules import (
    MEMORY,
    ZERO,
    Convert,
    FlagResult,
    FlagRule,
    Results,
    custom,
    custom_switch,
    each,
    ignored,
    ignores,
    number,
    only_value,
    path,
    refuses,
    switches,
    taken,
    takes,
    unsupported,
    whole_number,
)


def pretrained_model(flag: Flag, command: Command) -> Results:
    model = path(only_value(flag))
    if model.lower().endswith((".ckpt", ".pt", ".pth", ".bin")):
        return unsupported(flag, "spectune never opens pickles; enter the path of a .safetensors file")
    key = "model.residual" if command.has("network_weights") else "model.base"
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.lower().endswith(".safetensors")
    return taken(
        flag, {key: model}, "if this is a Hugging Face name, download it first" if is_hub_name else ""
    )


def network_weights(flag: Flag, command: Command) -> Results:
    settings = {"model.principal": path(only_value(flag)), "model.form": "residual"}
    return taken(flag, settings, "the two files must be a pair; a missing layer is an error, not zero")


def network_dim(flag: Flag, command: Command) -> Results:
    if command.has("network_weights"):
        return ignored(flag, "the principal file has its own ranks")
    value = only_value(flag)
    return taken(flag, {"model.rank": value if value == derived.FULL else whole_number(value)})


def network_alpha(flag: Flag, command: Command) -> Results:
    alpha, rank = number(only_value(flag)), command.value("network_dim")
    if rank in (None, derived.FULL) or alpha == number(rank):
        return ignored(flag, "alpha always equals the rank")
    return ignored(flag, f"alpha always equals the rank; sd-scripts scales by {alpha:g}/{rank}")


def network_module(flag: Flag, command: Command) -> Results:
    module = only_value(flag)
    if module not in ("lycoris.kohya", "networks.lora"):
        return unsupported(flag, "spectune trains the principal spectrum of the layers of lycoris.kohya")
    adds_conv = module == "networks.lora" and derived.network_argument(command, "conv_dim") is None
    note = "; 3x3 convolutions are trained too, networks.lora leaves them out" if adds_conv else ""
    return ignored(flag, f"spectune trains the layers of lycoris.kohya with preset=full{note}")


def network_dropout(flag: Flag, command: Command) -> Results:
    probability = number(only_value(flag))
    if command.value("network_module") == "networks.lora" and probability:
        return taken(flag, {"model.dropout_probability": probability})
    return ignored(flag, "LyCORIS applies it in bypass_mode only")


def conv_dim(flag: Flag, command: Command) -> Results:
    if command.has("network_weights"):
        return ignored(flag, "the principal file has its own ranks")
    return taken(flag, {"model.conv_rank": whole_number(only_value(flag))})


def trained_parts(flag: Flag, command: Command) -> Results:
    return taken(flag, {"model.parts": list(derived.parts_of(command))})


def train_text_encoder(flag: Flag, command: Command) -> Results:
    if command.script != "sdxl_train.py":
        return ignored(flag, f"{command.script} trains the encoders by default")
    return trained_parts(flag, command)


def vae_value(name: str) -> Convert:
    """Return the converter of the scale or the shift of the latents."""

    def convert(flag: Flag, command: Command) -> Results:
        return taken(flag, {f"vae.{name}": number(only_value(flag))}, "latents = (z - shift) * scale")

    return convert


# The values of the fork's get_vae_scale_and_shift.
_VAE_TYPES = {"sdxl": None, "flux2": (1.0, 0.0), "flux": (0.3611, 0.0), "sana": (0.41407, 0.0)}


def vae_type(flag: Flag, command: Command) -> Results:
    word = only_value(flag).lower()
    values = next((values for name, values in _VAE_TYPES.items() if name in word), None)
    if values is None:
        return ignored(flag, "the fork uses the scale and shift of SDXL")
    names = ("scale", "shift")
    settings = {
        f"vae.{name}": value
        for name, value in zip(names, values, strict=True)
        if not command.has(f"vae_custom_{name}")
    }
    return (
        taken(flag, settings)
        if settings
        else ignored(flag, "--vae_custom_scale and --vae_custom_shift set them")
    )


_ONE_RATE = "all layers of a part have the same learning rate"
_ONE_RANK = "`model.rank` and `model.conv_rank` apply to all layers"
_FALSE = ("False", "false")


def _network_args(flag: Flag, command: Command) -> Results:
    if not flag.values:
        return ignored(flag, "it has no value")
    return tuple(result for text in flag.values for result in _network_argument(flag, text, command))


def _network_argument(flag: Flag, text: str, command: Command) -> Results:
    name, equals, value = (part.strip() for part in text.partition("="))
    argument = Flag(name, (value,) if equals else (), parent=flag.name)
    if not equals:
        return unsupported(argument, "expected name=value")
    rule = NETWORK_ARGS.get(name)
    if rule is None:
        return (FlagResult(argument, "unknown", did_you_mean(name, NETWORK_ARGS)),)
    return rule.convert(argument, command)


MODEL: Mapping[str, FlagRule] = {
    "pretrained_model_name_or_path": custom(
        "`model.base`; with `--network_weights`: `model.residual`", pretrained_model
    ),
    "network_weights": custom('`model.principal` and `model.form = "residual"`', network_weights),
    "network_module": custom(
        "lycoris.kohya and networks.lora: ignored, spectune trains the layers of LyCORIS with preset=full",
        network_module,
    ),
    "network_dim": custom("`model.rank`; ignored with `--network_weights`, which has ranks", network_dim),
    "network_alpha": custom("ignored: alpha always equals the rank", network_alpha),
    "network_dropout": custom(
        "ignored: LyCORIS does not apply it; with networks.lora: `model.dropout_probability`", network_dropout
    ),
    "network_args": custom("see the table below", _network_args, max_values=None),
    "network_train_unet_only": custom_switch('`model.parts = ["unet"]`', trained_parts),
    "network_train_text_encoder_only": custom_switch('`model.parts = ["te1", "te2"]`', trained_parts),
    "train_text_encoder": custom_switch("`model.parts`, for sdxl_train.py", train_text_encoder),
    "dim_from_weights": ignores("the principal file always determines the ranks"),
    "scale_weight_norms": refuses("spectune does not limit norms", unless=ZERO),
    "base_weights": refuses("merge the adapter first with `spectune rebuild` and train its output"),
    "base_weights_multiplier": refuses("merge the adapter first with `spectune rebuild --strength`"),
    "fp8_base": refuses('set `model.quantize` to "nf4" or "int8", in the residual form'),
    "train_inpainting": refuses("spectune trains UNets without mask channels"),
    "fp8_base_unet": refuses('set `model.quantize` to "nf4" or "int8", in the residual form'),
    "v2": refuses("spectune trains SDXL only"),
    "vae": takes("vae.path", path, "a new latent space also needs `vae.name`, or scale, shift and padding"),
    "vae_custom_scale": custom("`vae.scale`", vae_value("scale")),
    "vae_custom_shift": custom("`vae.shift`", vae_value("shift")),
    "vae_reflection_padding": switches("vae.padding", "reflect"),
    "vae_type": custom("ignored for sdxl; sets `vae.scale` and `vae.shift` of other types", vae_type),
    "latent_channels": ignores("the files of UNet and VAE determine the channels"),
    **each("vae_channels_last vae_slices", ignores(MEMORY)),
    "freeze_unet_blocks": refuses("`model.layers` selects the layers to train"),
    "list_unet_blocks": ignores("`spectune inspect` lists the layers"),
    "disable_cross_attn_mask": ignores("SDXL has no attention mask"),
    "disable_mmap_load_safetensors": ignores(MEMORY),
    "no_half_vae": ignores("the VAE never runs in fp16"),
    "clip_skip": ignores("SDXL always uses the second-to-last layer"),
    "tokenizer_cache_dir": ignores("spectune includes the tokenizers"),
}

NETWORK_ARGS: Mapping[str, FlagRule] = {
    "conv_dim": custom("`model.conv_rank`; ignored with `--network_weights`, which has ranks", conv_dim),
    "conv_alpha": ignores("alpha always equals the rank"),
    "algo": refuses("spectune trains factors in the form of locon", unless=("locon", "lora")),
    "preset": refuses("spectune trains the layers of preset=full", unless=("full",)),
    "train_norm": refuses("spectune does not train norms", unless=_FALSE),
    "dropout": ignores("LyCORIS applies it in bypass_mode only"),
    **each(
        "rank_dropout module_dropout", refuses("`model.dropout_probability` drops directions", unless=ZERO)
    ),
    "rank_dropout_scale": ignores("it belongs to rank_dropout"),
    "bypass_mode": ignores("spectune always adds the change to the layer's output"),
    **each("use_tucker use_cp", refuses("spectune factors convolutions as matrices", unless=_FALSE)),
    "disable_conv_cp": ignores("spectune factors convolutions as matrices"),
    "dora_wd": refuses("spectune does not split off magnitudes", unless=_FALSE),
    "wd_on_output": ignores("it belongs to dora_wd"),
    "use_scalar": refuses("spectune has no scalar to train", unless=_FALSE),
    "rs_lora": refuses(
        '`model.frame = "plain"` with `model.scaling = "rank_stabilized"` scales by 4 / sqrt(rank), without '
        "another alpha",
        unless=_FALSE,
    ),
    **each(
        "loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio",
        refuses("both factors have the same learning rate", unless=ZERO),
    ),
    **each("down_lr_weight mid_lr_weight up_lr_weight", refuses(_ONE_RATE)),
    "block_lr_zero_threshold": ignores("it belongs to down_lr_weight, mid_lr_weight and up_lr_weight"),
    "block_dims": refuses(_ONE_RANK),
    "block_alphas": ignores("alpha always equals the rank"),
    "conv_block_dims": refuses(_ONE_RANK),
    "conv_block_alphas": ignores("alpha always equals the rank"),
    "network_reg_dims": refuses(_ONE_RANK),
    "network_reg_lrs": refuses(_ONE_RATE),
    **each("include_patterns exclude_patterns", refuses("`model.layers` selects the layers to train")),
    "verbose": ignores("`spectune inspect` lists the layers"),
    "block_size": ignores("it belongs to algo=dylora"),
    **each("constraint rescaled", ignores("it belongs to algo=diag-oft")),
    **each("decompose_both full_matrix unbalanced_factorization", ignores("it belongs to algo=lokr")),
    "use_conv_cp": refuses("spectune factors convolutions as matrices", unless=_FALSE),
    "weight_decompose": refuses("spectune does not split off magnitudes", unless=_FALSE),
    "train_t5xxl": ignores("SDXL has no T5"),
    "train_llm_adapter": ignores("SDXL has no such adapter"),
    "factor": ignores("it belongs to algo=lokr"),
}
