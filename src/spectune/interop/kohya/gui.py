"""Read .json files of the kohya_ss interface as the command that the interface runs.

Sources: lora_gui.py, finetune_gui.py and dreambooth_gui.py of kohya_ss 26.0. Its tabs write different files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from spectune.errors import InputError, counted, printable
from spectune.files.text import load_json
from spectune.interop.kohya.command_line import SCRIPTS, Command, Flag, group_flags

Tab = Literal["lora", "finetune", "dreambooth"]

# Names in the interface -> flags of sd-scripts.
_NAMES: Mapping[str, str] = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "image_folder": "train_data_dir",
    "lora_network_weights": "network_weights",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sdxl_no_half_vae": "no_half_vae",
}
# LoRA_type -> the network module. Those of LyCORIS are named after their algorithm.
_NETWORKS: Mapping[str, str] = {
    "Standard": "networks.lora",
    "Kohya LoCon": "networks.lora",
    "Kohya DyLoRA": "networks.dylora",
    "Kohya LoHa": "networks.loha",
    "Kohya LoKr": "networks.lokr",
    "LoRA-FA": "networks.lora_fa",
}
_LYCORIS = "LyCORIS/"
_ALGORITHMS = {"native fine-tuning": "full"}
_BLOCK_ARGS = (
    "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold", "block_dims",
    "block_alphas", "conv_block_dims", "conv_block_alphas",
)  # fmt: skip
_LYCORIS_ARGS = (
    "rank_dropout_scale",
    "train_norm",
    "use_cp",
    "use_tucker",
    "use_scalar",
    "dora_wd",
    "bypass_mode",
)
_LORAPLUS_ARGS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
_MULTIRES = ("multires_noise_iterations", "multires_noise_discount")
_OFFSET = ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")

# Settings that become part of other flags.
_PARTS_OF_FLAGS = frozenset(
    {
        "additional_parameters", "caption_metadata_filename", "conv_alpha", "conv_dim", "epoch",
        "generate_caption_database", "latent_metadata_filename", "learning_rate_te", "lr_warmup",
        "lr_warmup_steps", "max_train_epochs", "max_train_steps", "module_dropout", "rank_dropout",
        "sample_prompts", "text_encoder_lr", "train_dir", "unet_lr", "use_latent_files", "xformers",
        *_BLOCK_ARGS, *_LYCORIS_ARGS, *_LORAPLUS_ARGS,
    }
)  # fmt: skip
# Settings of the interface itself, of `accelerate launch`, and of other kinds of networks.
_GUI_ONLY = frozenset(
    {
        "LoRA_type", "LyCORIS_preset", "accelerate_extra_args", "batch_size", "constrain", "conv_alphas",
        "conv_dims", "create_buckets", "create_caption", "decompose_both", "dynamo_mode",
        "dynamo_use_dynamic", "dynamo_use_fullgraph", "extra_accelerate_launch_args", "factor", "full_path",
        "generate_image_buckets", "gpu_ids", "lowvram", "main_process_port", "model_list", "multi_gpu",
        "noise_offset_type", "num_cpu_threads_per_process", "num_machines", "num_processes", "rescaled",
        "save_as_bool", "sdxl", "sdxl_checkbox", "stop_text_encoder_training_pct", "train_on_input", "unit",
        "use_wandb",
    }
)  # fmt: skip
# Settings that the interface passes on for other models only.
_OTHER_MODELS = frozenset(
    {
        "ae", "apply_t5_attn_mask", "blocks_to_swap", "blockwise_fused_optimizers",
        "cpu_offload_checkpointing", "discrete_flow_shift", "enable_all_linear", "fp8_base_unet",
        "guidance_scale", "in_dims", "logit_mean", "logit_std", "mem_eff_save", "mode_scale",
        "model_prediction_type", "model_type", "pos_emb_random_crop_rate", "save_clip", "split_mode",
        "split_qkv", "timestep_sampling", "train_blocks", "train_lora_ggpo", "weighting_scheme",
    }
)  # fmt: skip
_OTHER_PREFIXES = (
    "anima_", "clip_g", "clip_l", "double_", "flux", "ggpo_", "hunyuan_", "img_", "lumina_", "save_t5",
    "sd3_", "show_timesteps", "single_", "t5xxl", "train_double_", "train_single_", "train_t5", "txt_",
)  # fmt: skip
_MODELS = {
    "flux1_checkbox": "FLUX", "sd3_checkbox": "SD3", "hunyuan_image_checkbox": "HunyuanImage",
    "anima_checkbox": "Anima", "lumina_checkbox": "Lumina", "v2": "SD 2",
}  # fmt: skip
# The finetune tab does not pass these on. The LoRA tab passes no_token_padding on to no script.
_NOT_PASSED: Mapping[Tab, frozenset[str]] = {
    "lora": frozenset({"no_token_padding", "stop_text_encoder_training"}),
    "finetune": frozenset(
        {
            "lr_scheduler_num_cycles", "lr_scheduler_power", "max_grad_norm", "no_token_padding",
            "prior_loss_weight", "reg_data_dir", "stop_text_encoder_training", "vae",
        }
    ),
    "dreambooth": frozenset({"train_text_encoder"}),
}  # fmt: skip
# What the interface shows, and passes on, if a file lacks these settings.
_SHOWN: Mapping[str, Any] = {
    "enable_bucket": True,
    "min_bucket_reso": 256,
    "max_bucket_reso": 2048,
    "caption_extension": ".txt",
}
_OFF = (None, "", False, 0, "0", "0.0", "None", "none", "no", [])
_ZERO_COUNTS = frozenset({"learning_rate", "learning_rate_te1", "learning_rate_te2", "max_grad_norm"})


@dataclass(frozen=True)
class _Settings:
    values: Mapping[str, Any]
    label: str

    @property
    def tab(self) -> Tab:
        """The tab of the interface that wrote the file."""
        if "LoRA_type" in self.values or "network_dim" in self.values:
            return "lora"
        if self.values.keys() & {"sdxl_checkbox", "image_folder", "train_dir", "dataset_repeats"}:
            return "finetune"
        is_dreambooth = self.values.keys() & {"learning_rate_te", "learning_rate_te1", "no_token_padding"}
        return "dreambooth" if is_dreambooth else "lora"

    def is_on(self, key: str) -> bool:
        value = self.values.get(key)
        if key == "mixed_precision" or (key in _ZERO_COUNTS and self.tab != "lora"):
            return value not in (None, "") and value is not False
        return value not in _OFF

    def text(self, key: str) -> str:
        return str(self.values[key]) if self.is_on(key) else ""

    def number(self, key: str) -> float:
        """Return a number; a missing or empty setting is 0.

        Raises:
            InputError: The value is not a number.
        """
        value = self.values.get(key)
        try:
            number = float(value) if value not in (None, "") else 0.0
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"{self.label}: `{key}` is `{printable(str(value), 40)}`, expected a number")
        return number


def parse_gui_json(text: str, label: str) -> Command:
    """Return the command that the interface starts. Settings that are off, empty or zero are left out.

    Raises:
        InputError: The text is not a file of the interface, or trains another model than SDXL.
    """
    settings = _Settings({**_SHOWN, **_json_object(text, label)}, label)
    _check_model(settings)
    skipped = _GUI_ONLY | _PARTS_OF_FLAGS | _OTHER_MODELS | _NOT_PASSED[settings.tab]
    on = [key for key in settings.values if settings.is_on(key)]
    flags = [
        _plain_flag(key, settings.values[key])
        for key in on
        if key not in skipped and not key.startswith(_OTHER_PREFIXES) and _has_this_noise(settings, key)
    ]
    flags += [*_attention(settings), *_network(settings), *_rates(settings), *_length(settings)]
    flags += [*_warmup(settings), *_captions(settings), *_previews(settings)]
    extra = settings.text("additional_parameters").replace('"', "").split()  # as the interface splits them
    flags += group_flags(extra)[0]
    script = SCRIPTS[0] if settings.tab == "lora" else SCRIPTS[1]
    return Command(script, tuple(flags), notes=tuple(_notes(settings, on)), is_complete=False)


def _json_object(text: str, label: str) -> dict[str, Any]:
    try:
        data: Any = load_json(text)
    except ValueError as error:
        raise InputError(f"{label} is not valid JSON: {printable(str(error))}") from error
    if not isinstance(data, dict) or not data:
        raise InputError(f"{label} contains no settings: expected an object of names and values")
    return cast("dict[str, Any]", data)


def _check_model(settings: _Settings) -> None:
    named = [name for key, name in _MODELS.items() if settings.is_on(key)]
    switches = [settings.values[key] for key in ("sdxl", "sdxl_checkbox") if key in settings.values]
    if switches and not any(switches):
        found = f"its `sdxl` is off, it trains {named[0]}" if named else "its `sdxl` is off"
    elif named and not switches:
        found = f"it trains {named[0]}"
    else:
        return
    raise InputError(f"{settings.label} does not train SDXL: {found}", hint="spectune trains SDXL only")


def _plain_flag(key: str, value: Any) -> Flag:
    name = _NAMES.get(key, key)
    if key in ("optimizer_args", "network_args", "lr_scheduler_args") and isinstance(value, str):
        return Flag(name, tuple(value.replace('"', "").split()))  # as the interface splits them
    if value is True:
        return Flag(name)
    return Flag(name, tuple(map(str, cast("list[Any]", value))) if isinstance(value, list) else (str(value),))


def _has_this_noise(settings: _Settings, key: str) -> bool:
    """Return whether the tab passes on this setting of the noise. The LoRA tab passes on one kind only."""
    if settings.tab != "lora":
        return True
    is_multires = settings.values.get("noise_offset_type") == "Multires"
    return key not in (_OFFSET if is_multires else _MULTIRES)


def _attention(settings: _Settings) -> Iterator[Flag]:
    value = settings.values.get("xformers")
    if value is True or value in ("xformers", "sdpa"):
        yield Flag("xformers" if value is True else str(value))


def _network(settings: _Settings) -> Iterator[Flag]:
    """Yield the network module and its arguments, which are separate settings in the interface."""
    if settings.tab != "lora":
        return
    kind = settings.text("LoRA_type") or "Standard"
    kind = f"{_LYCORIS}LoCon" if kind == "LoCon" else kind
    algorithm = kind.removeprefix(_LYCORIS).lower() if kind.startswith(_LYCORIS) else ""
    module = "lycoris.kohya" if algorithm else _NETWORKS.get(kind, kind)
    yield Flag("network_module", (module,))
    names = ["module_dropout", "rank_dropout", *_LORAPLUS_ARGS]
    names += ["conv_dim", "conv_alpha"] if kind not in ("Standard", "LoRA-FA") else []
    names += _LYCORIS_ARGS if module == "lycoris.kohya" else _BLOCK_ARGS
    arguments = [f"{name}={settings.values[name]}" for name in names if settings.is_on(name)]
    if algorithm:
        arguments += [
            f"algo={_ALGORITHMS.get(algorithm, algorithm)}",
            f"preset={settings.text('LyCORIS_preset') or 'full'}",
        ]
    if arguments:
        yield Flag("network_args", tuple(arguments))


def _rates(settings: _Settings) -> Iterator[Flag]:
    """Yield the learning rates of the parts. A rate of 0 beside one that is not freezes the part."""
    encoders, unet = settings.number("text_encoder_lr"), settings.number("unet_lr")
    if settings.tab == "dreambooth":
        if max(settings.number("learning_rate_te1"), settings.number("learning_rate_te2")) > 0:
            yield Flag("train_text_encoder")
    elif settings.tab == "lora":
        rates = ("learning_rate", "unet_lr", "text_encoder_lr")
        if not (any(map(settings.number, rates)) or settings.values.keys().isdisjoint(rates)):
            raise InputError(f"{settings.label}: all learning rates are 0, so that nothing is trained")
        if _frozen_part(settings):
            only_unet = encoders == 0
            yield Flag("network_train_unet_only" if only_unet else "network_train_text_encoder_only")
        yield from [Flag("text_encoder_lr", (str(encoders),))] if encoders else []
        yield from [Flag("unet_lr", (str(unet),))] if unet else []


def _frozen_part(settings: _Settings) -> str:
    """Return the name of the learning rate that is 0 while the other one is not, or an empty string."""
    keys = ("text_encoder_lr", "unet_lr")
    zeros = [key for key in keys if settings.number(key) == 0]
    both_set = all(key in settings.values for key in keys)
    return zeros[0] if settings.tab == "lora" and both_set and len(zeros) == 1 else ""


def _length(settings: _Settings) -> Iterator[Flag]:
    """Yield the number of steps or epochs.

    `epoch` counts only if `max_train_steps` is 0: the interface computes the steps from it and from the
    number of images. sd-scripts then lets `max_train_epochs` override the steps.
    """
    steps, epochs = (round(settings.number(key)) for key in ("max_train_steps", "max_train_epochs"))
    epoch = round(settings.number("epoch")) or 1
    if _is_halved(settings):
        steps, epoch = math.ceil(steps / 2), math.ceil(epoch / 2)
    if steps:
        yield Flag("max_train_steps", (str(steps),))
    if epochs or not (steps or settings.is_on("dataset_config")):
        yield Flag("max_train_epochs", (str(epochs or epoch),))


def _is_halved(settings: _Settings) -> bool:
    """Return whether the interface halves the steps, because mirrored images count twice in this tab."""
    return settings.tab == "finetune" and settings.is_on("flip_aug") and not settings.is_on("dataset_config")


def _warmup(settings: _Settings) -> Iterator[Flag]:
    percent, steps = settings.number("lr_warmup"), int(settings.number("lr_warmup_steps"))
    if steps > 0:
        yield Flag("lr_warmup_steps", (str(steps),))
    elif percent:
        yield Flag("lr_warmup_steps", (str(percent / 100),))


def _previews(settings: _Settings) -> Iterator[Flag]:
    """Yield the file that the interface writes the text of the prompts to."""
    if settings.is_on("sample_prompts"):
        yield Flag("sample_prompts", (f"{settings.text('output_dir') or '.'}/sample/prompt.txt",))


def _captions(settings: _Settings) -> Iterator[Flag]:
    """Yield the caption database of the finetune tab, which trains the images of one folder."""
    if settings.tab != "finetune":
        return
    if not settings.is_on("enable_bucket"):
        yield Flag("enable_bucket")
    if settings.is_on("dataset_config") or not settings.is_on("train_dir"):
        return
    key = "latent" if settings.values.get("use_latent_files") == "Yes" else "caption"
    name = settings.text(f"{key}_metadata_filename") or f"meta_{key[:3]}.json"
    yield Flag("in_json", (f"{settings.text('train_dir')}/{name}",))
    if settings.is_on("generate_caption_database"):
        yield Flag("generate_caption_database")


def _notes(settings: _Settings, on: list[str]) -> Iterator[str]:
    yield f"dropped: {counted(len(settings.values) - len(on), 'setting')} that are off, empty or zero"
    if gui_only := sorted(set(on) & _GUI_ONLY):
        yield f"dropped: settings of the interface itself: {', '.join(gui_only)}"
    if other := sorted(key for key in on if key in _OTHER_MODELS or key.startswith(_OTHER_PREFIXES)):
        yield f"dropped: settings of other models than SDXL: {', '.join(other)}"
    if not_passed := sorted(set(on) & _NOT_PASSED[settings.tab]):
        yield f"dropped: settings that the {settings.tab} tab does not pass on: {', '.join(not_passed)}"
    if frozen := _frozen_part(settings):
        yield f"`{frozen}` is 0, so the interface does not train that part"
    previews = ("sample_every_n_steps", "sample_every_n_epochs")
    if settings.is_on("sample_prompts") and any(map(settings.is_on, previews)):
        yield "the interface writes `sample_prompts` to sample/prompt.txt; write the prompts to run.preview"
    if _is_halved(settings):
        yield "the finetune tab halves the number of steps because of `flip_aug`; the recipe does the same"
    if settings.values.keys().isdisjoint({"sdxl", "sdxl_checkbox"}):
        yield "the file does not name a model; it is imported for SDXL"
