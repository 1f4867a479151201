"""The flags of sd-scripts for objective, loss, optimizer and learning rates."""

from __future__ import annotations

from collections.abc import Mapping

from spectune.interop.kohya.converters import (
    edm2_setting,
    eps_and_v_only,
    flow_distribution,
    flow_logit,
    flow_objective,
    flow_ratio,
    flow_resolution,
    flow_shift,
    huber,
    loss_type,
    objective,
    scale_v,
    snr_weighting,
)
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
    FlagRule,
    custom,
    custom_switch,
    ignores,
    number,
    refuses,
    switches,
    takes,
    whole_number,
)

_MEMORY = "run.gradient_checkpointing, run.offload, run.stream and model.quantize control memory"
_ZERO = ("0", "0.0")
_DIT_ONLY = "sd-scripts uses it for SD3, FLUX and Lumina only"
_EDM2_OWN = "[loss.edm2] has its own optimizer and starts from zero"
_EDM2_SCHEDULE = "it belongs to --edm2_loss_weighting_lr_scheduler"

# The public rectified-flow forks of sd-scripts for SDXL: sd-scripts by bluvoll, also its version f2vae.
FLOW_FORKS: Mapping[str, FlagRule] = {
    "flow_model": custom_switch('`objective.kind = "flow"`', objective),
    "flow_timestep_distribution": custom("`objective.flow_times`", flow_distribution),
    "flow_logit_mean": custom("`objective.flow_times_mean`, for logit_normal", flow_logit("mean")),
    "flow_logit_std": custom("`objective.flow_times_std`, for logit_normal", flow_logit("std")),
    "flow_uniform_static_ratio": custom("`objective.flow_shift`", flow_ratio),
    "flow_uniform_shift": custom_switch('`objective.flow_shift = "resolution"`', flow_resolution),
    "flow_uniform_base_pixels": refuses(
        "the shift by resolution is 1 at 1024 x 1024 pixels", unless=("1048576", "1048576.0")
    ),
    "flow_continuous_timesteps": ignores("the UNet always sees the exact noise level"),
    "flow_use_ot": refuses("noise is paired with images at random, not by optimal transport"),
    "contrastive_flow_matching": refuses("the loss has no contrastive term"),
    "cfm_lambda": ignores("it belongs to --contrastive_flow_matching"),
    # For the models of sd-scripts that are not SDXL.
    "weighting_scheme": refuses(_DIT_ONLY, unless=("uniform", "none")),
    "logit_mean": ignores(_DIT_ONLY),
    "logit_std": ignores(_DIT_ONLY),
    "mode_scale": ignores(_DIT_ONLY),
    "blocks_to_swap": ignores("run.stream and run.offload control memory"),
}

OBJECTIVE: Mapping[str, FlagRule] = {
    **FLOW_FORKS,
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
    **{
        f"edm2_loss_weighting_{name}": ignores("spectune draws no graph of the weighting")
        for name in (
            "generate_graph",
            "generate_graph_every_x_steps",
            "generate_graph_output_dir",
            "generate_graph_y_limit",
        )
    },
    "edm2_loss_weighting_importance_weighting": ignores('`loss.weighting = "edm2"` includes it'),
    "edm2_loss_weighting_importance_min_snr_gamma": edm2_setting("importance_gamma", number),
    "edm2_loss_weighting_importance_weighting_max": refuses(
        "the largest weight is 10", unless=("10", "10.0")
    ),
    "edm2_loss_weighting_importance_weighting_safety_override": ignores(
        "spectune uses one weighting at a time"
    ),
    "edm2_loss_weighting_initial_weights": refuses(_EDM2_OWN),
    "edm2_loss_weighting_optimizer_args": refuses(_EDM2_OWN),
    "edm2_loss_weighting_lr_scheduler": refuses(_EDM2_OWN),
    "edm2_loss_weighting_lr_scheduler_constant_percent": ignores(_EDM2_SCHEDULE),
    "edm2_loss_weighting_lr_scheduler_decay_scaling": ignores(_EDM2_SCHEDULE),
    "edm2_loss_weighting_lr_scheduler_warmup_percent": ignores(_EDM2_SCHEDULE),
    "edm2_loss_weighting_max_grad_norm": refuses(_EDM2_OWN),
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
    "lr_warmup_steps": custom("`optimizer.warmup_steps`, or `warmup_share` for a share of the steps", warmup),
    "stop_text_encoder_training": ignores("sd-scripts does not have it for SDXL"),
    "lr_scheduler_num_cycles": schedule_setting("cycles", "cosine_with_restarts", whole_number),
    "lr_scheduler_power": schedule_setting("power", "polynomial"),
    "lr_scheduler_min_lr_ratio": schedule_setting("final_share", "cosine_with_min_lr"),
    "lr_decay_steps": refuses("a schedule ends with the run", unless=("0",)),
    "lr_scheduler_timescale": ignores("it belongs to inverse_sqrt"),
    "lr_scheduler_type": refuses("`optimizer.schedule` names the schedule"),
    "lr_scheduler_args": refuses("`optimizer.schedule` names the schedule"),
    "max_grad_norm": takes("optimizer.max_grad_norm", number),
    "fused_backward_pass": ignores(_MEMORY),
    "use_sga": refuses("gradients are accumulated in fp32"),
    "no_sga": ignores("gradients are accumulated in fp32"),
    "fused_optimizer_groups": ignores(_MEMORY),
}
