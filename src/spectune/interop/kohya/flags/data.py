"""The flags of sd-scripts for images and captions."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Mapping
from pathlib import PureWindowsPath

from spectune.interop.kohya import derived
from spectune.interop.kohya.command_line import Command, Flag
from spectune.interop.kohya.rules import (
    ZERO,
    FlagResult,
    FlagRule,
    PathText,
    Results,
    custom,
    custom_switch,
    each,
    ignored,
    ignores,
    number,
    only_value,
    path,
    refuses,
    switches,
    taken,
    takes,
    unsupported,
    whole_number,
)
from spectune.training.recipe.sections.base import is_nearby


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


_MOVE_SIDECAR = "copy the file into the folder of the images and name it in data.caption.sidecar"


def in_json(flag: Flag, command: Command) -> Results:
    if command.has("generate_caption_database"):
        return ignored(flag, "it is made from the caption files, which spectune reads itself")
    file, folder = (
        PureWindowsPath(text) for text in (only_value(flag), command.value("train_data_dir") or "")
    )
    if (file.drive.lower(), file.root) != (folder.drive.lower(), folder.root):
        return unsupported(flag, _MOVE_SIDECAR)
    relative = posixpath.relpath(_below_root(file), _below_root(folder))
    if not is_nearby(relative):
        return unsupported(flag, _MOVE_SIDECAR)
    return taken(flag, {"data.caption.sidecar": [relative]}, "relative to the folder of the images")


def _below_root(path: PureWindowsPath) -> str:
    return "/".join(path.parts[1:] if path.anchor else path.parts)


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


DATA: Mapping[str, FlagRule] = {
    "train_data_dir": custom(
        "`data.folders`, the parent of `N_name` folders; with `--in_json` one folder: `data.sets`",
        train_data_dir,
    ),
    "dataset_repeats": custom("`repeats` in `data.sets`, with `--in_json`", dataset_repeats),
    "dataset_class": refuses("spectune never imports a name from a file"),
    "reg_data_dir": takes("data.regularisation_folders", lambda text: [path(text)]),
    "prior_loss_weight": takes("data.regularisation_weight", number),
    "dataset_config": custom(
        "`data.sets`, one table for each subset; a setting that differs between subsets is not supported",
        dataset_config,
    ),
    "in_json": custom("`data.caption.sidecar`", in_json),
    "generate_caption_database": ignores("spectune reads the caption files themselves"),
    "resolution": custom("`data.resolution_px`", resolution, max_values=None),
    "enable_bucket": switches("data.bucket.enabled"),
    "min_bucket_reso": takes("data.bucket.min_px", whole_number),
    "max_bucket_reso": takes("data.bucket.max_px", whole_number),
    "bucket_reso_steps": custom("`data.bucket.step_px`, at least 8", bucket_steps),
    "skip_image_resolution": refuses("all images are trained; `spectune train` counts small ones"),
    "resize_interpolation": refuses(
        "one filter is used for all images",
        unless=("area", "lanczos", "bilinear", "linear", "bicubic", "cubic"),
    ),
    "bucket_no_upscale": switches("data.bucket.no_upscale"),
    "caption_extension": takes("data.caption.extensions", lambda text: [text]),
    "caption_extention": takes("data.caption.extensions", lambda text: [text]),
    "shuffle_caption": switches("data.caption.shuffle"),
    "keep_tokens": custom("`data.caption.keep_tokens`; ignored without `--shuffle_caption`", keep_tokens),
    "keep_tokens_separator": takes("data.caption.keep_tokens_separator", str),
    "caption_separator": refuses("commas separate tags", unless=(",", ", ")),
    "secondary_separator": refuses("commas separate tags"),
    "enable_wildcard": custom_switch(
        '`data.caption.wildcards`, and `data.caption.lines = "random"`', wildcards
    ),
    "caption_prefix": takes("data.caption.prefix", str),
    "caption_suffix": takes("data.caption.suffix", str),
    "caption_dropout_rate": takes("data.caption.dropout_probability", number),
    "caption_dropout_every_n_epochs": refuses("captions are dropped at random", unless=ZERO),
    "caption_tag_dropout_rate": takes("data.caption.tag_dropout_probability", number),
    "token_warmup_min": refuses("all tags are used from the start", unless=("1",)),
    "token_warmup_step": refuses("all tags are used from the start", unless=("0",)),
    "weighted_captions": refuses("captions are used literally"),
    "no_token_padding": refuses("captions are padded, as in SDXL's own training"),
    "max_token_length": takes("data.caption.max_tokens", whole_number),
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
    "protected_tags_file": refuses("`data.caption.keep_tokens` and `keep_tokens_separator` protect tags"),
    **each(
        "log_caption_dropout log_caption_tag_dropout",
        ignores("spectune does not log the captions of each step"),
    ),
    "use_zero_cond_dropout": refuses(
        "a dropped caption is encoded as an empty text, as in sd-scripts", unless=("False", "false", "0")
    ),
    "skip_existing": ignores("the cache key is the content of image and VAE"),
    "network_multiplier": refuses("the change is always trained at full strength", unless=("1", "1.0")),
    "custom_attributes": ignores("sd-scripts does not use them for SDXL"),
    **each("skip_cache_check cache_info", ignores("the cache key is the content of image and VAE")),
    "max_data_loader_n_workers": takes("data.workers", whole_number),
    "prefetch_factor": ignores("the data loader of torch has its default"),
    "persistent_data_loader_workers": ignores("workers always persist"),
    "debug_dataset": ignores("`spectune train --dry-run` prints the plan"),
}
