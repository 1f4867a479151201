"""The flags of sd-scripts for objective and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spectune.errors import did_you_mean
from spectune.interop.kohya import derived
from spectune.interop.kohya.command_line import Command, Flag
from spectune.interop.kohya.rules import (
    ZERO,
    Convert,
    FlagRule,
    Results,
    custom,
    custom_switch,
    each,
    ignored,
    ignores,
    number,
    only_value,
    refuses,
    switches,
    taken,
    takes,
    unsupported,
    whole_number,
)
from spectune.training.objective.losses import HUBER_LOSSES, LOSSES


def objective(flag: Flag, command: Command) -> Results:
    kind = derived.objective_of(command)
    if flag.name == "v_parameterization" and kind == "flow":
        return ignored(flag, "--flow_matching and --flow_model override it")
    return taken(flag, {"objective.kind": kind})


def flow_distribution(flag: Flag, command: Command) -> Results:
    if not command.has("flow_model"):
        return ignored(flag, "it requires --flow_model")
    if only_value(flag) not in ("uniform", "logit_normal"):
        return unsupported(flag, "objective.flow_times is uniform or logit_normal")
    return taken(flag, {"objective.flow_times": only_value(flag)})


def flow_logit(name: str) -> Convert:
    """Return the converter of the mean or the standard deviation of logit-normal noise levels."""

    def convert(flag: Flag, command: Command) -> Results:
        if command.value("flow_timestep_distribution") != "logit_normal":
            return ignored(flag, "it is for --flow_timestep_distribution=logit_normal")
        return taken(flag, {f"objective.flow_times_{name}": number(only_value(flag))})

    return convert


def flow_ratio(flag: Flag, command: Command) -> Results:
    if not command.has("flow_model"):
        return ignored(flag, "it requires --flow_model")
    note = "the first version of the fork applies it to uniform only"
    is_uniform = command.value("flow_timestep_distribution") == "uniform"
    return taken(flag, {"objective.flow_shift": number(only_value(flag))}, "" if is_uniform else note)


def flow_resolution(flag: Flag, command: Command) -> Results:
    if not command.has("flow_model"):
        return ignored(flag, "it requires --flow_model")
    if command.has("flow_uniform_static_ratio"):
        return ignored(flag, "--flow_uniform_static_ratio overrides it")
    return taken(flag, {"objective.flow_shift": "resolution"})


def flow_of_several(setting: Mapping[str, Any], note: str = "") -> Convert:
    """Return the converter of a switch that uses the other images of a batch."""

    def convert(flag: Flag, command: Command) -> Results:
        if not command.has("flow_model"):
            return ignored(flag, "it requires --flow_model")
        if command.value("train_batch_size") in (None, "1"):
            return ignored(flag, "it needs a --train_batch_size of at least 2")
        return taken(flag, setting, note)

    return convert


def cfm_lambda(flag: Flag, command: Command) -> Results:
    if not command.has("contrastive_flow_matching"):
        return ignored(flag, "it requires --contrastive_flow_matching")
    return flow_of_several({"loss.contrastive_weight": number(only_value(flag))})(flag, command)


def flow_objective(flag: Flag, command: Command) -> Results:
    if only_value(flag) != "vector_field":
        return unsupported(flag, "the target of a flow model is the vector field, noise minus image")
    return ignored(flag, "vector_field is the target of flow")


def flow_shift(flag: Flag, command: Command) -> Results:
    if derived.objective_of(command) != "flow":
        return ignored(flag, "it requires --flow_matching")
    return taken(flag, {"objective.flow_shift": number(only_value(flag))})


def eps_and_v_only(key: str, value: object = None) -> FlagRule:
    """Return the rule of a setting that flow does not use. With `value` the flag is a switch."""

    def convert(flag: Flag, command: Command) -> Results:
        if derived.objective_of(command) == "flow":
            return ignored(flag, "flow does not use it")
        return taken(flag, {key: number(only_value(flag)) if value is None else value})

    return custom(f"`{key}`; ignored under flow", convert, max_values=1 if value is None else 0)


def snr_weighting(name: str, *, has_gamma: bool = True) -> FlagRule:
    """Return the rule of a loss weighting by signal-to-noise ratio, which flow does not have."""

    def convert(flag: Flag, command: Command) -> Results:
        if derived.objective_of(command) == "flow":
            return ignored(flag, "flow has no weighting by signal-to-noise ratio")
        gamma = {"loss.min_snr_gamma": number(only_value(flag))} if has_gamma else {}
        return taken(flag, {"loss.weighting": name, **gamma})

    keys = f'`loss.weighting = "{name}"`' + (" and `loss.min_snr_gamma`" if has_gamma else "")
    return custom(f"{keys}; ignored under flow", convert, max_values=int(has_gamma))


def edm2_setting(key: str, parse: Callable[[str], float]) -> FlagRule:
    def convert(flag: Flag, command: Command) -> Results:
        if not command.has("edm2_loss_weighting"):
            return ignored(flag, "it requires --edm2_loss_weighting")
        return taken(flag, {f"loss.edm2.{key}": parse(only_value(flag))})

    return custom(f"`loss.edm2.{key}`", convert)


def scale_v(flag: Flag, command: Command) -> Results:
    if derived.objective_of(command) != "v":
        return ignored(flag, "it requires --v_parameterization")
    return taken(flag, {"loss.scale_v_like_noise": True})


_LOSS_NAMES = {"l2": "mse"}


def loss_type(flag: Flag, command: Command) -> Results:
    name = _LOSS_NAMES.get(only_value(flag), only_value(flag))
    if name not in LOSSES:
        return unsupported(flag, f"loss.kind is one of {', '.join(LOSSES)}{did_you_mean(name, LOSSES)}")
    note = "fft_l1; the formula of the fork that added this flag is not published" if name == "fft" else ""
    return taken(flag, {"loss.kind": name}, note)


def huber(flag: Flag, command: Command) -> Results:
    if command.value("loss_type") not in HUBER_LOSSES:
        return ignored(flag, f"it is for --loss_type {' and '.join(HUBER_LOSSES)}")
    if flag.name == "huber_c":
        return taken(flag, {"loss.huber_c": number(only_value(flag))})
    if only_value(flag) not in ("snr", "constant"):
        return unsupported(flag, "loss.huber_schedule is snr or constant")
    return taken(flag, {"loss.huber_schedule": only_value(flag)})


CFM_LAMBDA = 0.05  # the fork's default
_DIT_ONLY = "sd-scripts uses it for SD3, FLUX and Lumina only"
_EDM2_OWN = "[loss.edm2] has its own optimizer and starts from zero"

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
    "flow_continuous_timesteps": ignores(
        'it is the default; `objective.flow_timestep = "integer"` does what the fork does without it'
    ),
    "flow_use_ot": custom_switch(
        '`objective.flow_pairing = "optimal_transport"`',
        flow_of_several(
            {"objective.flow_pairing": "optimal_transport"},
            "by squared distances; the fork compares directions only",
        ),
    ),
    "contrastive_flow_matching": custom_switch(
        f"`loss.contrastive_weight`, {CFM_LAMBDA} without --cfm_lambda",
        flow_of_several({"loss.contrastive_weight": CFM_LAMBDA}),
    ),
    "cfm_lambda": custom("`loss.contrastive_weight`, with --contrastive_flow_matching", cfm_lambda),
    # For the models of sd-scripts that are not SDXL.
    "weighting_scheme": refuses(_DIT_ONLY, unless=("uniform", "none")),
    **each("logit_mean logit_std mode_scale", ignores(_DIT_ONLY)),
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
    "adaptive_noise_scale": refuses("the offset is the same for every image", unless=ZERO),
    "multires_noise_iterations": refuses("only `objective.noise_offset` is available", unless=("0",)),
    "multires_noise_discount": ignores("it belongs to --multires_noise_iterations"),
    "ip_noise_gamma": eps_and_v_only("objective.input_perturbation"),
    "ip_noise_gamma_random_strength": refuses("the perturbation is the same in every step"),
    "min_timestep": refuses("eps and v train all noise levels", unless=("0",)),
    "max_timestep": refuses("eps and v train all noise levels", unless=("1000",)),
    "loss_type": custom("`loss.kind`; l2 is `mse`", loss_type),
    "huber_c": custom("`loss.huber_c`; ignored for other losses", huber),
    "huber_schedule": custom("`loss.huber_schedule`; ignored for other losses", huber),
    "huber_scale": refuses("`loss.huber_c` is the scale", unless=("1", "1.0")),
    "min_snr_gamma": snr_weighting("min_snr"),
    "soft_min_snr_gamma": snr_weighting("soft_min_snr"),
    "debiased_estimation_loss": snr_weighting("debiased", has_gamma=False),
    "scale_v_pred_loss_like_noise_pred": custom_switch("`loss.scale_v_like_noise`; ignored for eps", scale_v),
    "v_pred_like_loss": refuses("it mixes two losses", unless=ZERO),
    "edm2_loss_weighting": switches("loss.weighting", "edm2"),
    **each(
        "generate_graph generate_graph_every_x_steps generate_graph_output_dir generate_graph_y_limit",
        ignores("spectune draws no graph of the weighting"),
        prefix="edm2_loss_weighting_",
    ),
    "edm2_loss_weighting_importance_weighting": ignores('`loss.weighting = "edm2"` includes it'),
    "edm2_loss_weighting_importance_min_snr_gamma": edm2_setting("importance_gamma", number),
    "edm2_loss_weighting_importance_weighting_max": refuses(
        "the largest weight is 10", unless=("10", "10.0")
    ),
    "edm2_loss_weighting_importance_weighting_safety_override": ignores(
        "spectune uses one weighting at a time"
    ),
    **each("initial_weights optimizer_args lr_scheduler", refuses(_EDM2_OWN), prefix="edm2_loss_weighting_"),
    **each(
        "constant_percent decay_scaling warmup_percent",
        ignores("it belongs to --edm2_loss_weighting_lr_scheduler"),
        prefix="edm2_loss_weighting_lr_scheduler_",
    ),
    "edm2_loss_weighting_max_grad_norm": refuses(_EDM2_OWN),
    "edm2_loss_weighting_optimizer": ignores("the optimizer of the weighting is AdamW"),
    "edm2_loss_weighting_optimizer_lr": edm2_setting("learning_rate", number),
    "edm2_loss_weighting_num_channels": edm2_setting("fourier_features", whole_number),
}
