"""Every flag that is known, and how it is judged. docs/reference/kohya-flags.md is made of this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from spectune.errors import did_you_mean
from spectune.interop.kohya import dependent_flags as judges
from spectune.interop.kohya import optimizer_flags as optimizing
from spectune.interop.kohya.command_line import Command, Given
from spectune.interop.kohya.outcomes import (
    Answer,
    FlagRule,
    guarded,
    ignored,
    ignores,
    number,
    path,
    paths,
    refuses,
    switches,
    takes,
    unsupported,
    whole,
)

_MEMORY = "memory is handled by run.gradient_checkpointing, run.offload and model.quantize"
_ATTENTION = "torch's own scaled_dot_product_attention is used"
_METADATA = "every file says where it came from"
_STATE = "every save has a state, and so have the end and Ctrl-C"
_PER_STEPS = "counted in steps here: "
_DEVICES = "spectune runs under `accelerate launch` as well: accelerate launch -m spectune train"

MODEL: Mapping[str, FlagRule] = {
    "pretrained_model_name_or_path": FlagRule(
        "`model.base`; beside `--network_weights` `model.residual`", guarded(judges.pretrained_model)
    ),
    "network_weights": FlagRule(
        '`model.principal` and `model.form = "residual"`', guarded(judges.network_weights)
    ),
    "network_module": FlagRule(
        "lycoris.kohya or networks.lora: ignored, the layers are those of LyCORIS with preset=full",
        guarded(judges.network_module),
    ),
    "network_dim": FlagRule(
        "`model.rank`; ignored beside `--network_weights`, whose file has ranks", guarded(judges.network_dim)
    ),
    "network_alpha": FlagRule("ignored: alpha is the rank", guarded(judges.network_alpha)),
    "network_dropout": FlagRule(
        "ignored: LyCORIS does not apply it; with networks.lora `model.dropout_probability`",
        guarded(judges.network_dropout),
    ),
    "network_args": FlagRule(
        "see the table below", lambda given, command: network_arguments(given, command), values=None
    ),
    "network_train_unet_only": FlagRule('`model.parts = ["unet"]`', judges.trained_parts, values=0),
    "network_train_text_encoder_only": FlagRule(
        '`model.parts = ["te1", "te2"]`', judges.trained_parts, values=0
    ),
    "train_text_encoder": FlagRule("`model.parts`, for sdxl_train.py", judges.train_text_encoder, values=0),
    "dim_from_weights": ignores("ranks are always read from the principal file"),
    "scale_weight_norms": refuses("norms are not bounded", unless=("0", "0.0")),
    "base_weights": refuses("`spectune rebuild` merges an adapter first; train on what it writes"),
    "base_weights_multiplier": refuses("`spectune rebuild --strength` merges an adapter first"),
    "fp8_base": refuses('`model.quantize = "nf4"` or "int8", in the residual form'),
    "fp8_base_unet": refuses('`model.quantize = "nf4"` or "int8", in the residual form'),
    "v2": refuses("spectune is for SDXL"),
    "vae": takes("vae.path", path, "a new latent space also needs `vae.name`, or scale, shift and padding"),
    "no_half_vae": ignores("the autoencoder never runs in fp16"),
    "clip_skip": ignores("SDXL takes the layer before the last, whatever this says"),
    "tokenizer_cache_dir": ignores("the tokenizers come with spectune"),
}

NETWORK_ARGS: Mapping[str, FlagRule] = {
    "conv_dim": FlagRule(
        "`model.conv_rank`; ignored beside `--network_weights`, whose file has ranks",
        guarded(judges.conv_dim),
    ),
    "conv_alpha": ignores("alpha is the rank"),
    "algo": refuses("what is trained has the form of locon", unless=("locon", "lora")),
    "preset": refuses("the layers are those of preset=full", unless=("full",)),
    "train_norm": refuses("norms are not trained", unless=("False", "false")),
    "dropout": ignores("LyCORIS does not apply it outside of bypass_mode"),
    "rank_dropout": refuses("`model.dropout_probability` drops directions", unless=("0", "0.0")),
    "module_dropout": refuses("`model.dropout_probability` drops directions", unless=("0", "0.0")),
    "rank_dropout_scale": ignores("it belongs to rank_dropout"),
    "bypass_mode": ignores("a change is always applied beside the layer"),
    "use_tucker": refuses("convolutions are factored as matrices", unless=("False", "false")),
    "use_cp": refuses("convolutions are factored as matrices", unless=("False", "false")),
    "disable_conv_cp": ignores("convolutions are factored as matrices"),
    "dora_wd": refuses("magnitudes are not split off", unless=("False", "false")),
    "wd_on_output": ignores("it belongs to dora_wd"),
    "use_scalar": refuses("there is no scalar to train", unless=("False", "false")),
    "rs_lora": refuses("alpha is the rank", unless=("False", "false")),
    "loraplus_lr_ratio": refuses("both factors have one learning rate"),
    "factor": ignores("it belongs to algo=lokr"),
}

DATA: Mapping[str, FlagRule] = {
    "train_data_dir": FlagRule("`data.folders`; the parent of `N_name` folders", guarded(judges.train_data)),
    "reg_data_dir": takes("data.regularisation_folders", paths),
    "prior_loss_weight": takes("data.regularisation_weight", number),
    "dataset_config": refuses(
        "write each of its subsets as [[data.sets]] with path (image_dir), repeats (num_repeats) and caption"
    ),
    "in_json": refuses("write captions beside the pictures, or as lines of metadata.jsonl in their folder"),
    "resolution": FlagRule("`data.resolution_px`", guarded(judges.resolution), values=None),
    "enable_bucket": switches("data.bucket.enabled"),
    "min_bucket_reso": takes("data.bucket.min_px", whole),
    "max_bucket_reso": takes("data.bucket.max_px", whole),
    "bucket_reso_steps": takes("data.bucket.step_px", whole),
    "bucket_no_upscale": refuses("small pictures are enlarged, and counted"),
    "caption_extension": takes("data.caption.extensions", lambda text: [text]),
    "caption_extention": takes("data.caption.extensions", lambda text: [text]),
    "shuffle_caption": switches("data.caption.shuffle"),
    "keep_tokens": FlagRule(
        "`data.caption.keep_tokens`; ignored without `--shuffle_caption`", guarded(judges.keep_tokens)
    ),
    "keep_tokens_separator": refuses("`data.caption.keep_tokens` counts tags"),
    "caption_separator": refuses("tags are separated by commas", unless=(",", ", ")),
    "secondary_separator": refuses("tags are separated by commas"),
    "enable_wildcard": refuses("captions are taken as they are"),
    "caption_prefix": refuses("write it into the captions"),
    "caption_suffix": refuses("write it into the captions"),
    "caption_dropout_rate": takes("data.caption.dropout_probability", number),
    "caption_dropout_every_n_epochs": refuses("captions are dropped at random", unless=("0", "0.0")),
    "caption_tag_dropout_rate": takes("data.caption.tag_dropout_probability", number),
    "token_warmup_min": refuses("all tags are used from the start", unless=("1",)),
    "token_warmup_step": refuses("all tags are used from the start", unless=("0",)),
    "weighted_captions": refuses("captions are taken as they are"),
    "no_token_padding": refuses("captions are padded, as SDXL was trained"),
    "max_token_length": refuses("captions have 75 tokens, as SDXL was trained", unless=("75",)),
    "color_aug": switches("data.color_probability", 0.33, "as often as in sd-scripts"),
    "flip_aug": switches("data.flip_probability", 0.5),
    "random_crop": switches("data.random_crop"),
    "face_crop_aug_range": refuses("`data.random_crop` is the crop there is"),
    "alpha_mask": FlagRule('`data.mask = "alpha"`', judges.alpha_mask, values=0),
    "masked_loss": FlagRule(
        '`data.mask = "file"`, or "alpha" beside `--alpha_mask`', judges.masked_loss, values=0
    ),
    "conditioning_data_dir": refuses("put the masks beside the pictures: cat.mask.png for cat.webp"),
    "cache_latents": FlagRule(
        "`data.cache_latents`; ignored where crops or colours vary", judges.cache_latents, values=0
    ),
    "cache_latents_to_disk": FlagRule(
        "`data.cache_latents` and `data.cache_folder`", judges.cache_latents, values=0
    ),
    "cache_text_encoder_outputs": FlagRule(
        "`data.cache_text`; ignored where encoders train or captions vary", judges.cache_text, values=0
    ),
    "cache_text_encoder_outputs_to_disk": FlagRule("`data.cache_text`", judges.cache_text, values=0),
    "text_encoder_batch_size": ignores("captions are encoded before the training"),
    "vae_batch_size": ignores("pictures are encoded before the training"),
    "skip_cache_check": ignores("a cache is keyed by the contents of picture and autoencoder"),
    "cache_info": ignores("a cache is keyed by the contents of picture and autoencoder"),
    "max_data_loader_n_workers": takes("data.workers", whole),
    "persistent_data_loader_workers": ignores("workers always stay"),
    "debug_dataset": ignores("`spectune train --dry-run` prints the plan"),
}

OBJECTIVE: Mapping[str, FlagRule] = {
    "flow_matching": FlagRule('`objective.kind = "flow"`', judges.objective, values=0),
    "flow_matching_objective": FlagRule(
        "vector_field: ignored, it is what flow learns", guarded(judges.flow_objective)
    ),
    "flow_matching_shift": FlagRule("`objective.flow_shift`", guarded(judges.flow_shift)),
    "v_parameterization": FlagRule('`objective.kind = "v"`', judges.objective, values=0),
    "zero_terminal_snr": FlagRule(
        "`objective.zero_terminal_snr`; ignored under flow",
        judges.eps_and_v_only("objective.zero_terminal_snr", True),
        values=0,
    ),
    "noise_offset": takes("objective.noise_offset", number),
    "noise_offset_random_strength": refuses("the offset is the same in every step"),
    "adaptive_noise_scale": refuses("the offset is the same for every picture", unless=("0", "0.0")),
    "multires_noise_iterations": refuses("`objective.noise_offset` is what there is", unless=("0",)),
    "multires_noise_discount": ignores("it belongs to --multires_noise_iterations"),
    "ip_noise_gamma": FlagRule(
        "`objective.input_perturbation`; ignored under flow",
        judges.eps_and_v_only("objective.input_perturbation"),
    ),
    "ip_noise_gamma_random_strength": refuses("the perturbation is the same in every step"),
    "min_timestep": refuses("all noise levels are trained", unless=("0",)),
    "max_timestep": refuses("all noise levels are trained", unless=("1000",)),
    "loss_type": FlagRule("`loss.kind`; l2 is `mse`", guarded(judges.loss_type)),
    "huber_c": FlagRule("`loss.huber_c`; ignored for other losses", guarded(judges.huber)),
    "huber_schedule": FlagRule("`loss.huber_schedule`; ignored for other losses", guarded(judges.huber)),
    "huber_scale": refuses("`loss.huber_c` is the scale", unless=("1", "1.0")),
    "min_snr_gamma": FlagRule(
        '`loss.weighting = "min_snr"` and `loss.min_snr_gamma`; ignored under flow',
        judges.snr_weighting("min_snr"),
    ),
    "soft_min_snr_gamma": FlagRule(
        '`loss.weighting = "soft_min_snr"` and `loss.min_snr_gamma`; ignored under flow',
        judges.snr_weighting("soft_min_snr"),
    ),
    "debiased_estimation_loss": FlagRule(
        '`loss.weighting = "debiased"`; ignored under flow', judges.snr_weighting("debiased"), values=0
    ),
    "scale_v_pred_loss_like_noise_pred": FlagRule(
        "`loss.scale_v_like_noise`; ignored for eps", judges.scale_v, values=0
    ),
    "v_pred_like_loss": refuses("it mixes two losses", unless=("0", "0.0")),
    "edm2_loss_weighting": switches("loss.weighting", "edm2"),
    "edm2_loss_weighting_optimizer": ignores("its optimiser is AdamW"),
    "edm2_loss_weighting_optimizer_lr": FlagRule(
        "`loss.edm2.learning_rate`", judges.edm2_setting("learning_rate")
    ),
    "edm2_loss_weighting_num_channels": FlagRule(
        "`loss.edm2.fourier_features`", judges.edm2_setting("fourier_features")
    ),
}

OPTIMIZER: Mapping[str, FlagRule] = {
    "optimizer_type": FlagRule("`optimizer.name`, see the table below", guarded(optimizing.optimizer_type)),
    "use_8bit_adam": FlagRule('`optimizer.name = "adamw8bit"`', guarded(optimizing.optimizer_type), values=0),
    "use_lion_optimizer": FlagRule('`optimizer.name = "lion"`', guarded(optimizing.optimizer_type), values=0),
    "optimizer_args": FlagRule(
        "`optimizer.options`, each of them checked", optimizing.optimizer_args, values=None
    ),
    "learning_rate": FlagRule("`optimizer.learning_rate`", guarded(optimizing.learning_rate)),
    **{
        name: FlagRule(
            "`optimizer.part_learning_rates`; 0 takes the part out of `model.parts`",
            guarded(optimizing.learning_rate),
            values=len(optimizing.RATES[name]),
        )
        for name in optimizing.RATES
    },
    "block_lr": refuses("a part has one learning rate"),
    "lr_scheduler": FlagRule(
        "`optimizer.schedule`; ignored where the optimiser is schedule-free", guarded(optimizing.lr_scheduler)
    ),
    "lr_warmup_steps": FlagRule("`optimizer.warmup_steps`", guarded(optimizing.warmup)),
    "lr_scheduler_num_cycles": FlagRule(
        "`optimizer.cycles`, of cosine_with_restarts",
        optimizing.schedule_setting("cycles", of=("cosine_with_restarts",)),
    ),
    "lr_scheduler_power": FlagRule(
        "`optimizer.power`, of polynomial", optimizing.schedule_setting("power", of=("polynomial",))
    ),
    "lr_scheduler_min_lr_ratio": FlagRule(
        "`optimizer.final_share`, of cosine_with_min_lr",
        optimizing.schedule_setting("final_share", of=("cosine_with_min_lr",)),
    ),
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
    "output_name": FlagRule("`run.name`", guarded(judges.output_name)),
    "max_train_epochs": FlagRule("`run.epochs`", guarded(judges.length)),
    "max_train_steps": FlagRule("`run.steps`; ignored beside `--max_train_epochs`", guarded(judges.length)),
    "train_batch_size": takes("run.batch", whole),
    "gradient_accumulation_steps": takes("run.accumulation", whole),
    "gradient_checkpointing": switches("run.gradient_checkpointing"),
    "cpu_offload_checkpointing": ignores(_MEMORY),
    "mixed_precision": FlagRule("`run.precision`; fp16 becomes bf16", guarded(judges.mixed_precision)),
    "full_bf16": FlagRule(
        '`run.trained_precision = "bf16"` where the optimiser rounds stochastically',
        judges.full_bf16,
        values=0,
    ),
    "full_fp16": ignores("small updates are lost in fp16; what is trained stays in fp32"),
    "torch_compile": switches("run.compile"),
    "dynamo_backend": ignores("run.compile uses torch's own backend"),
    "seed": takes("run.seed", whole),
    "save_every_n_steps": takes("run.save_every_steps", whole),
    "save_every_n_epochs": refuses(f"{_PER_STEPS}run.save_every_steps"),
    "save_n_epoch_ratio": refuses(f"{_PER_STEPS}run.save_every_steps"),
    "save_last_n_steps": FlagRule("`run.keep_last`, in saves", guarded(judges.save_last)),
    "save_last_n_epochs": refuses("`run.keep_last` counts saves"),
    "save_last_n_steps_state": ignores(_STATE),
    "save_last_n_epochs_state": ignores(_STATE),
    "save_state": ignores(_STATE),
    "save_state_on_train_end": ignores(_STATE),
    "save_state_to_huggingface": refuses("nothing is uploaded"),
    "save_precision": ignores("deltas are kept in fp32; `spectune export --dtype` chooses a smaller type"),
    "save_model_as": ignores("everything is written as safetensors"),
    "use_safetensors": ignores("everything is written as safetensors"),
    "no_metadata": ignores(_METADATA),
    "training_comment": ignores(_METADATA),
    "resume": refuses("a state of sd-scripts cannot be read; a run of spectune goes on by itself"),
    "initial_epoch": refuses("a run goes on from its own state"),
    "initial_step": refuses("a run goes on from its own state"),
    "skip_until_initial_step": refuses("a run goes on from its own state"),
    "sample_every_n_steps": takes("run.preview_every_steps", whole),
    "sample_every_n_epochs": refuses(f"{_PER_STEPS}run.preview_every_steps"),
    "sample_at_first": ignores("`spectune sample` draws with the original"),
    "sample_prompts": refuses("previews draw captions of data.validation_folder, else of data.folders"),
    "sample_sampler": ignores("previews use a sampler that suits the objective"),
    "validate_every_n_steps": takes("run.validate_every_steps", whole),
    "validation_split": refuses(
        "data.validation_folder holds the pictures that are held out", unless=("0", "0.0")
    ),
    "validation_seed": ignores("noise and noise levels of held-out pictures are fixed"),
    "validate_every_n_epochs": refuses(f"{_PER_STEPS}run.validate_every_steps"),
    "max_validation_steps": ignores("all held-out pictures count"),
    "log_with": FlagRule("`run.tensorboard`", guarded(judges.log_with)),
    "logging_dir": ignores("logs go to the folder logs in run.output"),
    "log_prefix": ignores("logs are called after run.name"),
    "log_config": ignores("the recipe is kept with every state"),
    "log_tracker_name": ignores("logs are called after run.name"),
    "log_tracker_config": ignores("logs are TensorBoard's"),
    "wandb_api_key": ignores("logs are TensorBoard's"),
    "wandb_run_name": ignores("logs are TensorBoard's"),
    "console_log_level": ignores("it concerns sd-scripts' own messages"),
    "console_log_file": ignores("it concerns sd-scripts' own messages"),
    "console_log_simple": ignores("it concerns sd-scripts' own messages"),
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
    "config_file": ignores("what it holds is read as well"),
    "output_config": ignores("the recipe is the configuration"),
    "huggingface_repo_id": refuses("nothing is uploaded"),
    "huggingface_token": ignores("nothing is uploaded"),
}

RULES: Mapping[str, FlagRule] = {**MODEL, **DATA, **OBJECTIVE, **OPTIMIZER, **RUN}

# What sd-scripts does where a flag is missing and spectune would do something else.
DEFAULTS: Mapping[str, str] = {
    "caption_extension": ".caption",
    "learning_rate": "2e-6",
    "max_train_steps": "1600",
    "network_dim": "4",
    "output_name": "last",
}


def judge(given: Given, command: Command) -> tuple[Answer, ...]:
    """What becomes of a flag; a flag that no table knows is answered with the nearest that one does."""
    rule = RULES.get(given.name)
    if rule is None:
        return (Answer(given, "unknown", did_you_mean(given.name, RULES)),)
    return _with_stray(rule, given, rule.judge(given, command))


def _with_stray(rule: FlagRule, given: Given, answers: tuple[Answer, ...]) -> tuple[Answer, ...]:
    """The answers, which name the words behind the flag that it does not take."""
    if rule.values is None or len(given.values) <= rule.values:
        return answers
    stray = f"left out: {' '.join(given.values[rule.values :])}"
    return tuple(
        replace(answer, why=f"{answer.why}; {stray}" if answer.why else stray)
        if answer.verdict == "taken"
        else answer
        for answer in answers
    )


def network_arguments(given: Given, command: Command) -> tuple[Answer, ...]:
    """The same for each of the network's arguments."""
    if not given.values:
        return ignored(given, "it is empty")
    return tuple(answer for text in given.values for answer in _network_argument(given, text, command))


def _network_argument(given: Given, text: str, command: Command) -> tuple[Answer, ...]:
    name, equals, value = (part.strip() for part in text.partition("="))
    part = Given(name, (value,) if equals else (), within=given.name)
    if not equals:
        return unsupported(part, "expected name=value")
    rule = NETWORK_ARGS.get(name)
    if rule is None:
        return (Answer(part, "unknown", did_you_mean(name, NETWORK_ARGS)),)
    return rule.judge(part, command)
