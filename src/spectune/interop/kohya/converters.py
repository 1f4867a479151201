"""Converters of flags that depend on other flags. flags.py lists them."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Callable
from pathlib import PureWindowsPath

from spectune.errors import did_you_mean
from spectune.interop.kohya import derived
from spectune.interop.kohya.command_line import Command, Flag
from spectune.interop.kohya.rules import (
    Convert,
    FlagResult,
    FlagRule,
    PathText,
    Results,
    custom,
    ignored,
    number,
    only_value,
    path,
    taken,
    unsupported,
    whole_number,
)
from spectune.training.objective.losses import HUBER_LOSSES, LOSSES

# ---------------------------------------------------------------- model


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
    return taken(flag, {"model.rank": whole_number(only_value(flag))})


def network_alpha(flag: Flag, command: Command) -> Results:
    alpha, rank = number(only_value(flag)), command.value("network_dim")
    if rank is None or alpha == number(rank):
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


# ---------------------------------------------------------------- data


def train_data_dir(flag: Flag, command: Command) -> Results:
    folder = path(only_value(flag))
    if not command.has("in_json"):
        return taken(flag, {"data.folders": [folder]}, "the parent of `N_name` folders")
    repeats = whole_number(command.value("dataset_repeats") or "1")
    return taken(flag, {"data.sets": [{"path": folder, "repeats": repeats}]}, "one folder with all images")


def dataset_config(flag: Flag, command: Command) -> Results:
    if command.dataset is None:
        return unsupported(flag, "the file is not here; its subsets become [[data.sets]]")
    problems = tuple(FlagResult(part, "unsupported", why) for part, why in command.dataset.problems)
    return (*taken(flag, {"data.sets": list(command.dataset.sets)}), *problems)


def dataset_repeats(flag: Flag, command: Command) -> Results:
    if not command.has("in_json"):
        return ignored(flag, "it requires --in_json; the names of folders contain their repeats")
    return ignored(flag, "`repeats` in data.sets")


def in_json(flag: Flag, command: Command) -> Results:
    if command.has("generate_caption_database"):
        return ignored(flag, "it is made from the caption files, which spectune reads itself")
    file, folder = (
        PureWindowsPath(text) for text in (only_value(flag), command.value("train_data_dir") or "")
    )
    if not file.is_absolute() and not file.root:
        if folder.is_absolute() or folder.root:
            return unsupported(flag, "data.caption.sidecar is relative to the folder of the images")
        file = PureWindowsPath(posixpath.relpath(file.as_posix(), folder.as_posix()))
    return taken(flag, {"data.caption.sidecar": [file.as_posix()]}, "relative to the folder of the images")


def wildcards(flag: Flag, command: Command) -> Results:
    settings = {"data.caption.wildcards": True, "data.caption.lines": "random"}
    return taken(flag, settings, "sd-scripts then also draws one of several lines")


def resolution(flag: Flag, command: Command) -> Results:
    sides = [whole_number(side) for side in re.split(r"[,\sx]+", " ".join(flag.values).strip())]
    if len(sides) not in (1, 2) or min(sides) <= 0:
        raise ValueError("expected one or two sides in pixels")
    edge = round(math.sqrt(sides[0] * sides[-1]))
    is_square = sides[0] == sides[-1]
    return taken(flag, {"data.resolution_px": edge}, "" if is_square else "a square with as many pixels")


def bucket_steps(flag: Flag, command: Command) -> Results:
    step = whole_number(only_value(flag))
    rounded = max(8, -(-step // 8) * 8)
    return taken(flag, {"data.bucket.step_px": rounded}, "" if rounded == step else "a multiple of 8")


def keep_tokens(flag: Flag, command: Command) -> Results:
    count = whole_number(only_value(flag))
    if count and not derived.captions_vary(command):
        return ignored(flag, "the order of tags changes only with --shuffle_caption")
    return taken(flag, {"data.caption.keep_tokens": count})


def cache_latents(flag: Flag, command: Command) -> Results:
    if derived.pixels_vary(command):
        return ignored(flag, "crops or colors vary; data.cache_variants caches several of each image")
    settings: dict[str, object] = {"data.cache_latents": True}
    if flag.name == "cache_latents_to_disk":
        settings["data.cache_folder"] = PathText(f"{command.value('output_dir') or 'output'}/latents")
    return taken(flag, settings)


def cache_text(flag: Flag, command: Command) -> Results:
    if derived.captions_vary(command) or derived.parts_of(command) != ("unet",):
        return ignored(flag, "the encoders train or the captions vary, so their outputs cannot be cached")
    return taken(flag, {"data.cache_text": True})


def masked_loss(flag: Flag, command: Command) -> Results:
    if command.has("alpha_mask"):
        return taken(flag, {"data.mask": "alpha"})
    return taken(flag, {"data.mask": "file"}, "the mask of cat.webp is cat.mask.png in the same folder")


# ---------------------------------------------------------------- objective and loss


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


# ---------------------------------------------------------------- run


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
