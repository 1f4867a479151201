"""Flags whose meaning depends on others."""

from __future__ import annotations

import math
import re

from spectune.errors import did_you_mean
from spectune.interop.kohya import settings as setup
from spectune.interop.kohya.command_line import Command, Given
from spectune.interop.kohya.outcomes import (
    Answer,
    Judge,
    PathText,
    guarded,
    ignored,
    number,
    only,
    path,
    taken,
    unsupported,
    whole,
)
from spectune.training.objective.losses import LOSSES, SCHEDULED_LOSSES

Answers = tuple[Answer, ...]


# ---------------------------------------------------------------- model


def pretrained_model(given: Given, command: Command) -> Answers:
    model = path(only(given))
    if model.lower().endswith((".ckpt", ".pt", ".pth", ".bin")):
        return unsupported(given, "pickles are never opened; put in its path as .safetensors")
    key = "model.residual" if command.has("network_weights") else "model.base"
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.lower().endswith(".safetensors")
    return taken(given, {key: model}, "if this is a name on Hugging Face: download it first" if hub else "")


def network_weights(given: Given, command: Command) -> Answers:
    settings = {"model.principal": path(only(given)), "model.form": "residual"}
    return taken(given, settings, "the pair must belong together; missing layers are an error, not zeros")


def network_dim(given: Given, command: Command) -> Answers:
    if command.has("network_weights"):
        return ignored(given, "the principal file has its ranks")
    return taken(given, {"model.rank": whole(only(given))})


def network_alpha(given: Given, command: Command) -> Answers:
    alpha, rank = number(only(given)), command.value("network_dim")
    if rank is None or alpha == number(rank):
        return ignored(given, "alpha is the rank")
    return ignored(given, f"alpha is the rank; sd-scripts would scale by {alpha:g}/{rank}")


def network_module(given: Given, command: Command) -> Answers:
    module = only(given)
    if module not in ("lycoris.kohya", "networks.lora"):
        return unsupported(given, "what is trained is the principal spectrum of lycoris.kohya's layers")
    wider = module == "networks.lora" and setup.network_argument(command, "conv_dim") is None
    also = ", 3x3 convolutions included, which it would leave out" if wider else ""
    return ignored(given, f"the layers are those of lycoris.kohya with preset=full{also}")


def network_dropout(given: Given, command: Command) -> Answers:
    probability = number(only(given))
    if command.value("network_module") == "networks.lora" and probability:
        return taken(given, {"model.dropout_probability": probability})
    return ignored(given, "LyCORIS does not apply it outside of bypass_mode")


def conv_dim(given: Given, command: Command) -> Answers:
    if command.has("network_weights"):
        return ignored(given, "the principal file has its ranks")
    return taken(given, {"model.conv_rank": whole(only(given))})


def trained_parts(given: Given, command: Command) -> Answers:
    return taken(given, {"model.parts": list(setup.parts_of(command))})


def train_text_encoder(given: Given, command: Command) -> Answers:
    if command.script != "sdxl_train.py":
        return ignored(given, f"{command.script} trains the encoders unless it is told not to")
    return trained_parts(given, command)


# ---------------------------------------------------------------- data


def train_data(given: Given, command: Command) -> Answers:
    return taken(given, {"data.folders": [path(only(given))]}, "the parent of `N_name` folders")


def resolution(given: Given, command: Command) -> Answers:
    sides = [whole(side) for side in re.split(r"[,\sx]+", " ".join(given.values).strip())]
    if len(sides) not in (1, 2) or min(sides) <= 0:
        raise ValueError("expected a side in pixels, or two")
    edge = round(math.sqrt(sides[0] * sides[-1]))
    square = sides[0] == sides[-1]
    return taken(given, {"data.resolution_px": edge}, "" if square else "a square of as many pixels")


def keep_tokens(given: Given, command: Command) -> Answers:
    count = whole(only(given))
    if count and not setup.captions_vary(command):
        return ignored(given, "nothing moves the tags without --shuffle_caption")
    return taken(given, {"data.caption.keep_tokens": count})


def cache_latents(given: Given, command: Command) -> Answers:
    if setup.pixels_vary(command):
        return ignored(given, "crops or colours vary; data.cache_variants caches several of each picture")
    settings: dict[str, object] = {"data.cache_latents": True}
    if given.name == "cache_latents_to_disk":
        settings["data.cache_folder"] = PathText(f"{command.value('output_dir') or 'output'}/latents")
    return taken(given, settings)


def cache_text(given: Given, command: Command) -> Answers:
    if setup.captions_vary(command) or setup.parts_of(command) != ("unet",):
        return ignored(given, "encoders that train, or captions that vary, cannot be cached")
    return taken(given, {"data.cache_text": True})


def alpha_mask(given: Given, command: Command) -> Answers:
    return taken(given, {"data.mask": "alpha"})


def masked_loss(given: Given, command: Command) -> Answers:
    if command.has("alpha_mask"):
        return alpha_mask(given, command)
    return taken(given, {"data.mask": "file"}, "the mask of cat.webp is cat.mask.png beside it")


# ---------------------------------------------------------------- objective and loss


def objective(given: Given, command: Command) -> Answers:
    kind = setup.objective_of(command)
    if given.name == "v_parameterization" and kind == "flow":
        return ignored(given, "--flow_matching decides")
    return taken(given, {"objective.kind": kind})


def flow_objective(given: Given, command: Command) -> Answers:
    if only(given) != "vector_field":
        return unsupported(given, "the answer of a flow model is the vector field, noise minus picture")
    return ignored(given, "vector_field is what flow learns")


def flow_shift(given: Given, command: Command) -> Answers:
    if setup.objective_of(command) != "flow":
        return ignored(given, "--flow_matching is not given")
    return taken(given, {"objective.flow_shift": number(only(given))})


def eps_and_v_only(key: str, value: object = None) -> Judge:
    """A setting that flow has no use for; its value is that of the flag unless one is given here."""

    def judge(given: Given, command: Command) -> Answers:
        if setup.objective_of(command) == "flow":
            return ignored(given, "flow has no use for it")
        return taken(given, {key: number(only(given)) if value is None else value})

    return guarded(judge)


def snr_weighting(name: str) -> Judge:
    def judge(given: Given, command: Command) -> Answers:
        if setup.objective_of(command) == "flow":
            return ignored(given, "weights by signal-to-noise ratio are off under flow")
        settings: dict[str, object] = {"loss.weighting": name}
        if name in ("min_snr", "soft_min_snr"):
            settings["loss.min_snr_gamma"] = number(only(given))
        return taken(given, settings)

    return guarded(judge)


def edm2_setting(key: str) -> Judge:
    def judge(given: Given, command: Command) -> Answers:
        if not command.has("edm2_loss_weighting"):
            return ignored(given, "--edm2_loss_weighting is not given")
        value = number(only(given))
        return taken(given, {f"loss.edm2.{key}": int(value) if key == "fourier_features" else value})

    return guarded(judge)


def scale_v(given: Given, command: Command) -> Answers:
    if setup.objective_of(command) != "v":
        return ignored(given, "--v_parameterization is not given")
    return taken(given, {"loss.scale_v_like_noise": True})


_LOSS_NAMES = {"l2": "mse"}


def loss_type(given: Given, command: Command) -> Answers:
    name = _LOSS_NAMES.get(only(given), only(given))
    if name not in LOSSES:
        return unsupported(given, f"loss.kind is one of {', '.join(LOSSES)}{did_you_mean(name, LOSSES)}")
    why = "fft_l1; what the fork of this flag computes is not published" if name == "fft" else ""
    return taken(given, {"loss.kind": name}, why)


def huber(given: Given, command: Command) -> Answers:
    if command.value("loss_type") not in SCHEDULED_LOSSES:
        return ignored(given, f"it is for --loss_type {' and '.join(SCHEDULED_LOSSES)}")
    if given.name == "huber_c":
        return taken(given, {"loss.huber_c": number(only(given))})
    if only(given) not in ("snr", "constant"):
        return unsupported(given, "loss.huber_schedule is snr or constant")
    return taken(given, {"loss.huber_schedule": only(given)})


# ---------------------------------------------------------------- run


def output_name(given: Given, command: Command) -> Answers:
    name = re.sub(r"[^\w.-]", "_", only(given)).lstrip(".") or "last"
    changed = "" if name == only(given) else "letters, digits, dots and dashes only"
    return taken(given, {"run.name": name}, changed)


def length(given: Given, command: Command) -> Answers:
    if given.name == "max_train_epochs":
        return taken(given, {"run.epochs": whole(only(given))})
    if command.has("max_train_epochs"):
        return ignored(given, "--max_train_epochs overrules it")
    return taken(given, {"run.steps": whole(only(given))})


def mixed_precision(given: Given, command: Command) -> Answers:
    match only(given):
        case "no":
            return taken(given, {"run.precision": "fp32"})
        case "bf16":
            return taken(given, {"run.precision": "bf16"})
        case "fp16":
            return taken(given, {"run.precision": "bf16"}, "fp16 overflows without loss scaling")
        case other:
            return unsupported(given, f"run.precision is fp32 or bf16, not {other}")


def full_bf16(given: Given, command: Command) -> Answers:
    if not setup.traits(command).rounds_stochastically:
        return ignored(given, "this optimiser would lose small updates; what is trained stays in fp32")
    return taken(given, {"run.trained_precision": "bf16"})


def save_last(given: Given, command: Command) -> Answers:
    span, every = whole(only(given)), whole(command.value("save_every_n_steps") or "0")
    if every <= 0:
        return ignored(given, "--save_every_n_steps is not given")
    return taken(given, {"run.keep_last": max(1, span // every + 1)}, "saves that stay")


def log_with(given: Given, command: Command) -> Answers:
    word = only(given)
    if word == "wandb":
        return unsupported(given, "run.tensorboard writes logs that wandb can read")
    return taken(given, {"run.tensorboard": True})
