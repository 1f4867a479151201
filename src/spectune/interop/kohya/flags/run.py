"""The flags of sd-scripts for length, precision, memory, saves and logs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from spectune.interop.kohya import derived
from spectune.interop.kohya.command_line import Command, Flag
from spectune.interop.kohya.rules import (
    MEMORY,
    ZERO,
    FlagRule,
    Results,
    custom,
    custom_switch,
    each,
    ignored,
    ignores,
    only_value,
    path,
    refuses,
    switches,
    taken,
    takes,
    unsupported,
    whole_number,
)


def output_name(flag: Flag, command: Command) -> Results:
    name = re.sub(r"[^\w.-]", "_", only_value(flag)).lstrip(".") or "last"
    note = "" if name == only_value(flag) else "letters, digits, dots and dashes only"
    return taken(flag, {"run.name": name}, note)


def run_length(flag: Flag, command: Command) -> Results:
    if flag.name == "max_train_epochs":
        return taken(flag, {"run.epochs": whole_number(only_value(flag))})
    if command.has("max_train_epochs"):
        return ignored(flag, "--max_train_epochs overrides it")
    return taken(flag, {"run.steps": whole_number(only_value(flag))})


def mixed_precision(flag: Flag, command: Command) -> Results:
    if derived.is_full(command):
        if command.has("full_bf16"):
            return ignored(flag, "--full_bf16 sets the dtype of the weights")
        if only_value(flag) != "no":
            return ignored(flag, "the weights are fp32, as in sd-scripts; here the activations are fp32 too")
    match only_value(flag):
        case "no":
            return taken(flag, {"run.precision": "fp32"})
        case "bf16":
            return taken(flag, {"run.precision": "bf16"})
        case "fp16":
            return ignored(flag, "the default is bf16, or fp16 on a GPU without bf16")
        case other:
            return unsupported(flag, f"run.precision is fp32, bf16 or fp16, not {other}")


def full_bf16(flag: Flag, command: Command) -> Results:
    if derived.is_full(command) and derived.traits(command).tensorwise:
        note = "spectune rounds stochastically, so that small updates are not lost"
        return taken(flag, {"run.trained_precision": "bf16"}, note)
    if not derived.traits(command).rounds_stochastically:
        return ignored(flag, "this optimizer would lose small updates; trained parameters stay in fp32")
    return taken(flag, {"run.trained_precision": "bf16"})


def save_last(flag: Flag, command: Command) -> Results:
    unit = flag.name.rpartition("_")[2]
    every = whole_number(command.value(f"save_every_n_{unit}") or "0")
    if every <= 0:
        return ignored(flag, f"it requires --save_every_n_{unit}")
    count = whole_number(only_value(flag))  # sd-scripts counts epochs in saves, and steps in steps
    saves = count if unit == "epochs" else count // every + 1
    return taken(flag, {"run.keep_last_adapters": max(1, saves)}, "the number of saves to keep")


def sample_every(flag: Flag, command: Command) -> Results:
    if command.has("sample_every_n_epochs"):
        return ignored(flag, "--sample_every_n_epochs overrides it")
    return taken(flag, {"run.preview_every_steps": whole_number(only_value(flag))})


def sample_prompts(flag: Flag, command: Command) -> Results:
    when = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
    if not any(map(command.has, when)):
        return ignored(flag, "it requires --sample_every_n_steps or --sample_every_n_epochs")
    if flag.name == "sample_sampler":
        return taken(flag, {"run.preview_sampler": only_value(flag)})
    return taken(flag, {"run.preview": path(only_value(flag))})


def log_with(flag: Flag, command: Command) -> Results:
    match only_value(flag):
        case "tensorboard":
            return taken(flag, {"run.tensorboard": True})
        case "wandb":
            return taken(flag, {"run.trackers": ["wandb"]}, "TensorBoard logs are written too")
        case "all":
            return taken(flag, {"run.tensorboard": True, "run.trackers": ["wandb"]})
        case other:
            return unsupported(flag, f"run.trackers names the programs, not {other}")


_METADATA = "every file has metadata about its origin"
_DEVICES = "for several GPUs: torchrun --nproc_per_node N -m spectune train"
_OWN_STATE = "a run resumes from its own state only"

RUN: Mapping[str, FlagRule] = {
    "output_dir": takes("run.output", path),
    "output_name": custom("`run.name`", output_name),
    "max_train_epochs": custom("`run.epochs`", run_length),
    "max_train_steps": custom("`run.steps`; ignored with `--max_train_epochs`", run_length),
    "train_batch_size": takes("run.batch", whole_number),
    "gradient_accumulation_steps": takes("run.accumulation", whole_number),
    "gradient_checkpointing": switches("run.gradient_checkpointing"),
    "cpu_offload_checkpointing": ignores(MEMORY),
    "mixed_precision": custom("`run.precision`; fp16 is left to the default", mixed_precision),
    "full_bf16": custom_switch(
        '`run.trained_precision = "bf16"` if the optimizer rounds stochastically', full_bf16
    ),
    "full_fp16": ignores("fp16 loses small updates; trained parameters stay in fp32"),
    "torch_compile": switches("run.compile"),
    "dynamo_backend": ignores("run.compile uses the default backend of torch"),
    "seed": takes("run.seed", whole_number),
    "save_every_n_steps": takes("run.save_every_steps", whole_number),
    "save_every_n_epochs": takes("run.save_every_epochs", whole_number),
    "save_n_epoch_ratio": refuses("`run.save_every_epochs` counts epochs"),
    "save_last_n_steps": custom("`run.keep_last_adapters`, in saves", save_last),
    "save_last_n_epochs": custom("`run.keep_last_adapters`, in saves", save_last),
    **each(
        "save_last_n_steps_state save_last_n_epochs_state save_state save_state_on_train_end",
        ignores("every save includes a state; so do the end of the run and Ctrl-C"),
    ),
    "save_state_to_huggingface": refuses("spectune uploads nothing"),
    "save_precision": ignores("deltas are saved in fp32; `spectune export --dtype` selects a smaller dtype"),
    **each("save_model_as use_safetensors", ignores("all files are safetensors")),
    **each("no_metadata training_comment", ignores(_METADATA)),
    **each(
        "title author description license tags usage_hint thumbnail merged_from trigger_phrase preprocessor "
        "is_negative_embedding",
        ignores(_METADATA),
        prefix="metadata_",
    ),
    "resume": refuses("spectune cannot read a state of sd-scripts; its own runs resume without a flag"),
    **each("initial_epoch initial_step skip_until_initial_step", refuses(_OWN_STATE)),
    "sample_every_n_steps": custom(
        "`run.preview_every_steps`; ignored with `--sample_every_n_epochs`", sample_every
    ),
    "sample_every_n_epochs": takes("run.preview_every_epochs", whole_number),
    "sample_at_first": switches("run.preview_at_start"),
    "sample_prompts": custom("`run.preview`; ignored without an interval", sample_prompts),
    "sample_sampler": custom("`run.preview_sampler`; ignored without an interval", sample_prompts),
    "validate_every_n_steps": takes("run.validate_every_steps", whole_number),
    "validation_split": refuses("data.validation_folder contains the validation images", unless=ZERO),
    "validation_seed": ignores("noise and noise levels of validation images are fixed"),
    "validate_every_n_epochs": takes("run.validate_every_epochs", whole_number),
    "max_validation_steps": ignores("validation uses all of its images"),
    "log_with": custom("`run.tensorboard`; wandb: `run.trackers`", log_with),
    "logging_dir": ignores("logs are in the folder logs of run.output"),
    "log_prefix": ignores("run.name is the name of the logs"),
    "log_config": ignores("every state contains the recipe"),
    "log_tracker_name": ignores("run.name is the name of the logs"),
    **each("log_tracker_config wandb_api_key wandb_run_name", ignores("logs are for TensorBoard")),
    **each(
        "console_log_level console_log_file console_log_simple",
        ignores("it applies to messages of sd-scripts"),
    ),
    **each(
        "xformers mem_eff_attn sdpa diffusers_xformers flash_attn",
        ignores("spectune uses scaled_dot_product_attention of torch"),
    ),
    **each("lowram lowvram highvram", ignores(MEMORY)),
    "deepspeed": refuses(_DEVICES),
    **each(
        "zero_stage zero3_init_flag zero3_save_16bit_model offload_optimizer_device "
        "offload_optimizer_nvme_path offload_param_device offload_param_nvme_path "
        "fp16_master_weights_and_gradients",
        ignores("it belongs to --deepspeed"),
    ),
    **each("ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph", ignores(_DEVICES)),
    "config_file": ignores("its settings are imported too"),
    "output_config": ignores("the recipe is the configuration"),
    "huggingface_repo_id": refuses("spectune uploads nothing"),
    **each(
        "huggingface_repo_type huggingface_repo_visibility huggingface_path_in_repo async_upload",
        ignores("spectune uploads nothing"),
    ),
    "resume_from_huggingface": refuses(_OWN_STATE),
    "huggingface_token": ignores("spectune uploads nothing"),
}
