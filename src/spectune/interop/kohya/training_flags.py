"""The flags of sd-scripts for objective, loss, optimizer and learning rates."""

from __future__ import annotations

from collections.abc import Mapping

from spectune.interop.kohya.converters import (
    edm2_setting,
    eps_and_v_only,
    flow_objective,
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
