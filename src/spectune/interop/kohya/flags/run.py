"""The flags of sd-scripts for length, precision, memory, saves and logs."""

from __future__ import annotations

from collections.abc import Mapping

from spectune.interop.kohya.converters import (
    full_bf16,
    log_with,
    mixed_precision,
    output_name,
    run_length,
    sample_every,
    sample_prompts,
    save_last,
)
from spectune.interop.kohya.rules import (
    FlagRule,
    custom,
    custom_switch,
    ignores,
    path,
    refuses,
    switches,
    takes,
    whole_number,
)

_MEMORY = "run.gradient_checkpointing, run.offload, run.stream and model.quantize control memory"
_ATTENTION = "spectune uses scaled_dot_product_attention of torch"
_METADATA = "every file has metadata about its origin"
_STATE = "every save includes a state; so do the end of the run and Ctrl-C"
_DEVICES = "for several GPUs: accelerate launch -m spectune train"
_OWN_STATE = "a run resumes from its own state only"
_ZERO = ("0", "0.0")

RUN: Mapping[str, FlagRule] = {
    "output_dir": takes("run.output", path),
    "output_name": custom("`run.name`", output_name),
    "max_train_epochs": custom("`run.epochs`", run_length),
    "max_train_steps": custom("`run.steps`; ignored with `--max_train_epochs`", run_length),
    "train_batch_size": takes("run.batch", whole_number),
    "gradient_accumulation_steps": takes("run.accumulation", whole_number),
    "gradient_checkpointing": switches("run.gradient_checkpointing"),
    "cpu_offload_checkpointing": ignores(_MEMORY),
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
    "save_last_n_steps_state": ignores(_STATE),
    "save_last_n_epochs_state": ignores(_STATE),
    "save_state": ignores(_STATE),
    "save_state_on_train_end": ignores(_STATE),
    "save_state_to_huggingface": refuses("spectune uploads nothing"),
    "save_precision": ignores("deltas are saved in fp32; `spectune export --dtype` selects a smaller dtype"),
    "save_model_as": ignores("all files are safetensors"),
    "use_safetensors": ignores("all files are safetensors"),
    "no_metadata": ignores(_METADATA),
    "training_comment": ignores(_METADATA),
    **{
        f"metadata_{name}": ignores(_METADATA)
        for name in (
            "title",
            "author",
            "description",
            "license",
            "tags",
            "usage_hint",
            "thumbnail",
            "merged_from",
            "trigger_phrase",
            "preprocessor",
            "is_negative_embedding",
        )
    },
    "resume": refuses("spectune cannot read a state of sd-scripts; its own runs resume without a flag"),
    "initial_epoch": refuses(_OWN_STATE),
    "initial_step": refuses(_OWN_STATE),
    "skip_until_initial_step": refuses(_OWN_STATE),
    "sample_every_n_steps": custom(
        "`run.preview_every_steps`; ignored with `--sample_every_n_epochs`", sample_every
    ),
    "sample_every_n_epochs": takes("run.preview_every_epochs", whole_number),
    "sample_at_first": switches("run.preview_at_start"),
    "sample_prompts": custom("`run.preview`; ignored without an interval", sample_prompts),
    "sample_sampler": custom("`run.preview_sampler`; ignored without an interval", sample_prompts),
    "validate_every_n_steps": takes("run.validate_every_steps", whole_number),
    "validation_split": refuses("data.validation_folder contains the validation images", unless=_ZERO),
    "validation_seed": ignores("noise and noise levels of validation images are fixed"),
    "validate_every_n_epochs": takes("run.validate_every_epochs", whole_number),
    "max_validation_steps": ignores("validation uses all of its images"),
    "log_with": custom("`run.tensorboard`; wandb: `run.trackers`", log_with),
    "logging_dir": ignores("logs are in the folder logs of run.output"),
    "log_prefix": ignores("run.name is the name of the logs"),
    "log_config": ignores("every state contains the recipe"),
    "log_tracker_name": ignores("run.name is the name of the logs"),
    "log_tracker_config": ignores("logs are for TensorBoard"),
    "wandb_api_key": ignores("logs are for TensorBoard"),
    "wandb_run_name": ignores("logs are for TensorBoard"),
    "console_log_level": ignores("it applies to messages of sd-scripts"),
    "console_log_file": ignores("it applies to messages of sd-scripts"),
    "console_log_simple": ignores("it applies to messages of sd-scripts"),
    "xformers": ignores(_ATTENTION),
    "mem_eff_attn": ignores(_ATTENTION),
    "sdpa": ignores(_ATTENTION),
    "diffusers_xformers": ignores(_ATTENTION),
    "flash_attn": ignores(_ATTENTION),
    "lowram": ignores(_MEMORY),
    "lowvram": ignores(_MEMORY),
    "highvram": ignores(_MEMORY),
    "deepspeed": refuses(_DEVICES),
    **{
        name: ignores("it belongs to --deepspeed")
        for name in (
            "zero_stage",
            "zero3_init_flag",
            "zero3_save_16bit_model",
            "offload_optimizer_device",
            "offload_optimizer_nvme_path",
            "offload_param_device",
            "offload_param_nvme_path",
            "fp16_master_weights_and_gradients",
        )
    },
    "ddp_timeout": ignores(_DEVICES),
    "ddp_gradient_as_bucket_view": ignores(_DEVICES),
    "ddp_static_graph": ignores(_DEVICES),
    "config_file": ignores("its settings are imported too"),
    "output_config": ignores("the recipe is the configuration"),
    "huggingface_repo_id": refuses("spectune uploads nothing"),
    "huggingface_repo_type": ignores("spectune uploads nothing"),
    "huggingface_repo_visibility": ignores("spectune uploads nothing"),
    "huggingface_path_in_repo": ignores("spectune uploads nothing"),
    "async_upload": ignores("spectune uploads nothing"),
    "resume_from_huggingface": refuses(_OWN_STATE),
    "huggingface_token": ignores("spectune uploads nothing"),
}
