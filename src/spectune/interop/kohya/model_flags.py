"""The flags of sd-scripts for the model, the network and the autoencoder."""

from __future__ import annotations

from collections.abc import Mapping

from spectune.errors import did_you_mean
from spectune.interop.kohya.command_line import Command, Flag
from spectune.interop.kohya.converters import (
    conv_dim,
    network_alpha,
    network_dim,
    network_dropout,
    network_module,
    network_weights,
    pretrained_model,
    train_text_encoder,
    trained_parts,
)
from spectune.interop.kohya.rules import (
    FlagResult,
    FlagRule,
    Results,
    custom,
    custom_switch,
    ignored,
    ignores,
    path,
    refuses,
    takes,
    unsupported,
)

_ZERO = ("0", "0.0")
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
    "scale_weight_norms": refuses("spectune does not limit norms", unless=_ZERO),
    "base_weights": refuses("merge the adapter first with `spectune rebuild` and train its output"),
    "base_weights_multiplier": refuses("merge the adapter first with `spectune rebuild --strength`"),
    "fp8_base": refuses('set `model.quantize` to "nf4" or "int8", in the residual form'),
    "fp8_base_unet": refuses('set `model.quantize` to "nf4" or "int8", in the residual form'),
    "v2": refuses("spectune trains SDXL only"),
    "vae": takes("vae.path", path, "a new latent space also needs `vae.name`, or scale, shift and padding"),
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
    "rank_dropout": refuses("`model.dropout_probability` drops directions", unless=_ZERO),
    "module_dropout": refuses("`model.dropout_probability` drops directions", unless=_ZERO),
    "rank_dropout_scale": ignores("it belongs to rank_dropout"),
    "bypass_mode": ignores("spectune always adds the change to the layer's output"),
    "use_tucker": refuses("spectune factors convolutions as matrices", unless=_FALSE),
    "use_cp": refuses("spectune factors convolutions as matrices", unless=_FALSE),
    "disable_conv_cp": ignores("spectune factors convolutions as matrices"),
    "dora_wd": refuses("spectune does not split off magnitudes", unless=_FALSE),
    "wd_on_output": ignores("it belongs to dora_wd"),
    "use_scalar": refuses("spectune has no scalar to train", unless=_FALSE),
    "rs_lora": refuses("alpha always equals the rank", unless=_FALSE),
    "loraplus_lr_ratio": refuses("both factors have the same learning rate"),
    "factor": ignores("it belongs to algo=lokr"),
}
