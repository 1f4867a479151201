"""The flags of sd-scripts for images and captions."""

from __future__ import annotations

from collections.abc import Mapping

from spectune.interop.kohya.converters import (
    bucket_steps,
    cache_latents,
    cache_text,
    dataset_config,
    dataset_repeats,
    in_json,
    keep_tokens,
    masked_loss,
    resolution,
    train_data_dir,
    wildcards,
)
from spectune.interop.kohya.rules import (
    FlagRule,
    custom,
    custom_switch,
    ignores,
    number,
    path,
    refuses,
    switches,
    takes,
    whole_number,
)

_FALSE = ("False", "false", "0")
_ZERO = ("0", "0.0")

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
    "caption_dropout_every_n_epochs": refuses("captions are dropped at random", unless=_ZERO),
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
    "log_caption_dropout": ignores("spectune does not log the captions of each step"),
    "log_caption_tag_dropout": ignores("spectune does not log the captions of each step"),
    "use_zero_cond_dropout": refuses(
        "a dropped caption is encoded as an empty text, as in sd-scripts", unless=_FALSE
    ),
    "skip_existing": ignores("the cache key is the content of image and VAE"),
    "network_multiplier": refuses("the change is always trained at full strength", unless=("1", "1.0")),
    "custom_attributes": ignores("sd-scripts does not use them for SDXL"),
    "skip_cache_check": ignores("the cache key is the content of image and VAE"),
    "cache_info": ignores("the cache key is the content of image and VAE"),
    "max_data_loader_n_workers": takes("data.workers", whole_number),
    "prefetch_factor": ignores("the data loader of torch has its default"),
    "persistent_data_loader_workers": ignores("workers always persist"),
    "debug_dataset": ignores("`spectune train --dry-run` prints the plan"),
}
