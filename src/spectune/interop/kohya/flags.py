"""The table of all known flags of sd-scripts, one row per flag.

docs/reference/kohya-flags.md is generated from this table. The kinds of rows:

- `takes(key, parse)`: the flag's value becomes the value of a recipe key.
- `switches(key, value)`: the flag sets a recipe key to `value`.
- `ignores(why)`: the flag changes nothing in spectune.
- `refuses(why)`: spectune has no counterpart; the values in `unless` have no effect and are ignored.
- `custom(summary, convert)`: the result depends on other flags; see the converters.
- `custom_switch(summary, convert)`: the same for a flag without value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from spectune.errors import did_you_mean
from spectune.interop.kohya.command_line import Command, Flag
from spectune.interop.kohya.converters import (
    cache_latents,
    cache_text,
    conv_dim,
    edm2_setting,
    eps_and_v_only,
    flow_objective,
    flow_shift,
    full_bf16,
    huber,
    keep_tokens,
    log_with,
    loss_type,
    masked_loss,
    mixed_precision,
    network_alpha,
    network_dim,
    network_dropout,
    network_module,
    network_weights,
    objective,
    output_name,
    pretrained_model,
    resolution,
    run_length,
    save_last,
    scale_v,
    snr_weighting,
    train_data_dir,
    train_text_encoder,
    trained_parts,
)
from spectune.interop.kohya.derived import OPTIMIZER_NAMES
from spectune.interop.kohya.optimizer_converters import (
    RATE_FLAGS,
    learning_rate,
    lr_scheduler,
    optimizer_args,
    optimizer_type,
    schedule_setting,
    warmup,
)
from spectune.interop.kohya.rules import (
    FlagResult,
    FlagRule,
    Results,
    custom,
    custom_switch,
    ignored,
    ignores,
    number,
    path,
    refuses,
    switches,
    takes,
    unsupported,
    whole_number,
)

_MEMORY = "run.gradient_checkpointing, run.offload, run.stream and model.quantize control memory"
_ATTENTION = "spectune uses scaled_dot_product_attention of torch"
_METADATA = "every file has metadata about its origin"
_STATE = "every save includes a state; so do the end of the run and Ctrl-C"
_STEPS = "spectune counts in steps: "
_DEVICES = "for several GPUs: accelerate launch -m spectune train"
_OWN_STATE = "a run resumes from its own state only"
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

DATA: Mapping[str, FlagRule] = {
    "train_data_dir": custom("`data.folders`; the parent of `N_name` folders", train_data_dir),
    "reg_data_dir": takes("data.regularisation_folders", lambda text: [path(text)]),
    "prior_loss_weight": takes("data.regularisation_weight", number),
    "dataset_config": refuses(
        "write each subset as [[data.sets]] with path (image_dir), repeats (num_repeats) and caption"
    ),
    "in_json": refuses("write captions as .txt files or as metadata.jsonl in the folder of the images"),
    "resolution": custom("`data.resolution_px`", resolution, max_values=None),
    "enable_bucket": switches("data.bucket.enabled"),
    "min_bucket_reso": takes("data.bucket.min_px", whole_number),
    "max_bucket_reso": takes("data.bucket.max_px", whole_number),
    "bucket_reso_steps": takes("data.bucket.step_px", whole_number),
    "bucket_no_upscale": refuses("spectune enlarges small images and counts them"),
    "caption_extension": takes("data.caption.extensions", lambda text: [text]),
    "caption_extention": takes("data.caption.extensions", lambda text: [text]),
    "shuffle_caption": switches("data.caption.shuffle"),
    "keep_tokens": custom("`data.caption.keep_tokens`; ignored without `--shuffle_caption`", keep_tokens),
    "keep_tokens_separator": refuses("`data.caption.keep_tokens` counts tags"),
    "caption_separator": refuses("commas separate tags", unless=(",", ", ")),
    "secondary_separator": refuses("commas separate tags"),
    "enable_wildcard": refuses("captions are used literally"),
    "caption_prefix": refuses("add it to the captions"),
    "caption_suffix": refuses("add it to the captions"),
    "caption_dropout_rate": takes("data.caption.dropout_probability", number),
    "caption_dropout_every_n_epochs": refuses("captions are dropped at random", unless=_ZERO),
    "caption_tag_dropout_rate": takes("data.caption.tag_dropout_probability", number),
    "token_warmup_min": refuses("all tags are used from the start", unless=("1",)),
    "token_warmup_step": refuses("all tags are used from the start", unless=("0",)),
    "weighted_captions": refuses("captions are used literally"),
    "no_token_padding": refuses("captions are padded, as in SDXL's own training"),
    "max_token_length": refuses("captions have 75 tokens, as in SDXL's own training", unless=("75",)),
    "color_aug": switches("data.color_probability", 0.33, "the probability of sd-scripts"),
    "flip_aug": switches("data.flip_probability", 0.5),
    "random_crop": switches("data.random_crop"),
    "face_crop_aug_range": refuses("`data.random_crop` is the only crop"),
    "alpha_mask": switches("data.mask", "alpha"),
    "masked_loss": custom_switch('`data.mask = "file"`, or "alpha" with `--alpha_mask`', masked_loss),
    "conditioning_data_dir": refuses("put the masks into the image folder: cat.mask.png for cat.webp"),
    "cache_latents": custom_switch("`data.cache_latents`; ignored if crops or colors vary", cache_latents),
    "cache_latents_to_disk": custom_switch("`data.cache_latents` and `data.cache_folder`", cache_latents),
    "cache_text_encoder_outputs": custom_switch(
        "`data.cache_text`; ignored if encoders train or captions vary", cache_text
    ),
    "cache_text_encoder_outputs_to_disk": custom_switch("`data.cache_text`", cache_text),
    "text_encoder_batch_size": ignores("captions are encoded before training"),
    "vae_batch_size": ignores("images are encoded before training"),
    "skip_cache_check": ignores("the cache key is the content of image and VAE"),
    "cache_info": ignores("the cache key is the content of image and VAE"),
    "max_data_loader_n_workers": takes("data.workers", whole_number),
    "persistent_data_loader_workers": ignores("workers always persist"),
    "debug_dataset": ignores("`spectune train --dry-run` prints the plan"),
}

OBJECTIVE: Mapping[str, FlagRule] = {
    "flow_matching": custom_switch('`objective.kind = "flow"`', objective),
    "flow_matching_objective": custom("vector_field: ignored, it is the target of flow", flow_objective),
    "flow_matching_shift": custom("`objective.flow_shift`", flow_shift),
    "v_parameterization": custom_switch('`objective.kind = "v"`', objective),
    "zero_terminal_snr": eps_and_v_only("objective.zero_terminal_snr", True),
    "noise_offset": takes("objective.noise_offset", number),
    "noise_offset_random_strength": refuses("the offset is the same in every step"),
    "adaptive_noise_scale": refuses("the offset is the same for every image", unless=_ZERO),
    "multires_noise_iterations": refuses("only `objective.noise_offset` is available", unless=("0",)),
    "multires_noise_discount": ignores("it belongs to --multires_noise_iterations"),
    "ip_noise_gamma": eps_and_v_only("objective.input_perturbation"),
    "ip_noise_gamma_random_strength": refuses("the perturbation is the same in every step"),
    "min_timestep": refuses("spectune trains all noise levels", unless=("0",)),
    "max_timestep": refuses("spectune trains all noise levels", unless=("1000",)),
    "loss_type": custom("`loss.kind`; l2 is `mse`", loss_type),
    "huber_c": custom("`loss.huber_c`; ignored for other losses", huber),
    "huber_schedule": custom("`loss.huber_schedule`; ignored for other losses", huber),
    "huber_scale": refuses("`loss.huber_c` is the scale", unless=("1", "1.0")),
    "min_snr_gamma": snr_weighting("min_snr"),
    "soft_min_snr_gamma": snr_weighting("soft_min_snr"),
    "debiased_estimation_loss": snr_weighting("debiased", has_gamma=False),
    "scale_v_pred_loss_like_noise_pred": custom_switch("`loss.scale_v_like_noise`; ignored for eps", scale_v),
    "v_pred_like_loss": refuses("it mixes two losses", unless=_ZERO),
    "edm2_loss_weighting": switches("loss.weighting", "edm2"),
    "edm2_loss_weighting_optimizer": ignores("the optimizer of the weighting is AdamW"),
    "edm2_loss_weighting_optimizer_lr": edm2_setting("learning_rate", number),
    "edm2_loss_weighting_num_channels": edm2_setting("fourier_features", whole_number),
}

OPTIMIZER: Mapping[str, FlagRule] = {
    "optimizer_type": custom("`optimizer.name`, see the table below", optimizer_type),
    "use_8bit_adam": custom_switch('`optimizer.name = "adamw8bit"`', optimizer_type),
    "use_lion_optimizer": custom_switch('`optimizer.name = "lion"`', optimizer_type),
    "optimizer_args": custom("`optimizer.options`, each of them checked", optimizer_args, max_values=None),
    "learning_rate": custom("`optimizer.learning_rate`", learning_rate),
    **{
        name: custom(
            "`optimizer.part_learning_rates`; 0 removes the part from `model.parts`",
            learning_rate,
            max_values=len(parts),
        )
        for name, parts in RATE_FLAGS.items()
    },
    "block_lr": refuses("all layers of a part have the same learning rate"),
    "lr_scheduler": custom("`optimizer.schedule`; ignored if the optimizer is schedule-free", lr_scheduler),
    "lr_warmup_steps": custom("`optimizer.warmup_steps`", warmup),
    "lr_scheduler_num_cycles": schedule_setting("cycles", "cosine_with_restarts", whole_number),
    "lr_scheduler_power": schedule_setting("power", "polynomial"),
    "lr_scheduler_min_lr_ratio": schedule_setting("final_share", "cosine_with_min_lr"),
    "lr_decay_steps": refuses("a schedule ends with the run", unless=("0",)),
    "lr_scheduler_timescale": ignores("it belongs to inverse_sqrt"),
    "lr_scheduler_type": refuses("`optimizer.schedule` names the schedule"),
    "lr_scheduler_args": refuses("`optimizer.schedule` names the schedule"),
    "max_grad_norm": takes("optimizer.max_grad_norm", number),
    "fused_backward_pass": ignores(_MEMORY),
    "fused_optimizer_groups": ignores(_MEMORY),
}

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
    "save_every_n_epochs": refuses(f"{_STEPS}run.save_every_steps"),
    "save_n_epoch_ratio": refuses(f"{_STEPS}run.save_every_steps"),
    "save_last_n_steps": custom("`run.keep_last`, in saves", save_last),
    "save_last_n_epochs": refuses("`run.keep_last` counts saves"),
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
    "resume": refuses("spectune cannot read a state of sd-scripts; its own runs resume without a flag"),
    "initial_epoch": refuses(_OWN_STATE),
    "initial_step": refuses(_OWN_STATE),
    "skip_until_initial_step": refuses(_OWN_STATE),
    "sample_every_n_steps": takes("run.preview_every_steps", whole_number),
    "sample_every_n_epochs": refuses(f"{_STEPS}run.preview_every_steps"),
    "sample_at_first": ignores("`spectune sample` draws images of the original"),
    "sample_prompts": refuses("previews use captions of data.validation_folder, or of data.folders"),
    "sample_sampler": ignores("previews use a sampler that fits the objective"),
    "validate_every_n_steps": takes("run.validate_every_steps", whole_number),
    "validation_split": refuses("data.validation_folder contains the validation images", unless=_ZERO),
    "validation_seed": ignores("noise and noise levels of validation images are fixed"),
    "validate_every_n_epochs": refuses(f"{_STEPS}run.validate_every_steps"),
    "max_validation_steps": ignores("validation uses all of its images"),
    "log_with": custom("`run.tensorboard`", log_with),
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
    "flash_attn": ignores(_ATTENTION),
    "lowram": ignores(_MEMORY),
    "lowvram": ignores(_MEMORY),
    "highvram": ignores(_MEMORY),
    "deepspeed": refuses(_DEVICES),
    "zero_stage": ignores("it belongs to --deepspeed"),
    "ddp_timeout": ignores(_DEVICES),
    "ddp_gradient_as_bucket_view": ignores(_DEVICES),
    "ddp_static_graph": ignores(_DEVICES),
    "config_file": ignores("its settings are imported too"),
    "output_config": ignores("the recipe is the configuration"),
    "huggingface_repo_id": refuses("spectune uploads nothing"),
    "huggingface_token": ignores("spectune uploads nothing"),
}

RULES: Mapping[str, FlagRule] = {**MODEL, **DATA, **OBJECTIVE, **OPTIMIZER, **RUN}

# Defaults of sd-scripts that differ from those of spectune.
DEFAULTS: Mapping[str, str] = {
    "caption_extension": ".caption",
    "learning_rate": "2e-6",
    "max_train_steps": "1600",
    "network_dim": "4",
    "output_name": "last",
}


def convert_flag(flag: Flag, command: Command) -> Results:
    """Return the results of a flag. For an unknown flag, suggest the closest known one."""
    rule = RULES.get(flag.name)
    if rule is None:
        return (FlagResult(flag, "unknown", did_you_mean(flag.name, RULES)),)
    results = rule.convert(flag, command)
    if rule.max_values is None or len(flag.values) <= rule.max_values:
        return results
    note = f"extra values ignored: {' '.join(flag.values[rule.max_values :])}"
    return tuple(
        replace(result, why=f"{result.why}; {note}" if result.why else note)
        if result.verdict == "taken"
        else result
        for result in results
    )


# ---------------------------------------------------------------- the page


def flags_page() -> str:
    """Return the tables of docs/reference/kohya-flags.md."""
    network_args = {name: rule.summary for name, rule in NETWORK_ARGS.items()}
    optimizers = {name: f"`{ours}`" for name, ours in OPTIMIZER_NAMES.items()}
    sections: list[str] = []
    for heading, rules in (
        ("Model", MODEL),
        ("Data", DATA),
        ("Objective and loss", OBJECTIVE),
        ("Optimizer", OPTIMIZER),
        ("Run", RUN),
    ):
        sections += [f"## {heading}", *_table("flag", {name: rule.summary for name, rule in rules.items()})]
        if rules is MODEL:
            sections += ["### Arguments in `--network_args`", *_table("argument", network_args)]
        if rules is OPTIMIZER:
            sections += [
                "### Names in `--optimizer_type`",
                *_table("name, in any case, with or without import path", optimizers),
            ]
    return "\n\n".join(sections) + "\n"


def _table(header: str, rows: Mapping[str, str]) -> Iterator[str]:
    yield "\n".join(
        [f"| {header} | in spectune |", "| --- | --- |", *(f"| `{k}` | {v} |" for k, v in rows.items())]
    )
