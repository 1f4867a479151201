"""The two commands of the guide as users paste them, and a short command for single flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectune.interop.kohya.command_line import parse_command
from spectune.interop.kohya.importer import ImportedRecipe, import_command
from spectune.training.recipe.commented import nested

GUIDE_FIX = r"""accelerate launch --num_cpu_threads_per_process 8 sdxl_train_network.py ^
--pretrained_model_name_or_path="K:/Comfyui_033/ComfyUI/models/checkpoints/bigaspV25_v25.safetensors" ^
--train_data_dir="fix" ^
--output_dir="output_dir" ^
--output_name="ext_big25_fix" ^
--network_args "conv_dim=64" "conv_alpha=64" ^
--resolution="1024" ^
--save_model_as="safetensors" ^
--network_module="lycoris.kohya" ^
--shuffle_caption ^
--max_train_epochs=1000 ^
--save_every_n_steps=1 ^
--save_state_on_train_end ^
--save_precision=bf16 ^
--train_batch_size=1 ^
--gradient_accumulation_steps=1 ^
--max_data_loader_n_workers=1 ^
--enable_bucket ^
--bucket_reso_steps=64 ^
--min_bucket_reso=768 ^
--max_bucket_reso=1280 ^
--mixed_precision="bf16" ^
--caption_extension=".txt" ^
--gradient_checkpointing ^
--network_dim=64 ^
--network_alpha=64 ^
--optimizer_type="AdamW8bit" ^
--optimizer_args ^
--learning_rate=0.000000000000000000000001 ^
--loss_type="fft" ^
--xformers ^
--network_weights="K:/Comfyui_033/ComfyUI/models/loras/train/ext_big25.safetensors" ^
--full_bf16 ^
--mem_eff_attn ^
--lr_scheduler="constant" ^
--seed=1 ^
--no_metadata ^
--logging_dir="logs" ^
--log_with="tensorboard" ^
--persistent_data_loader_workers ^
"""

GUIDE_TRAINING = r"""accelerate launch --num_cpu_threads_per_process 8 sdxl_train_network.py ^
--pretrained_model_name_or_path="K:/Comfyui_033/ComfyUI/output/checkpoints/BIG25NULLdiff.safetensors" ^
--train_data_dir="mydataset" ^
--output_dir="output_dir" ^
--output_name="NAME" ^
--network_args "algo=locon" "conv_dim=64" "conv_alpha=64" "preset=full" "train_norm=False" ^
--resolution="1024" ^
--save_model_as="safetensors" ^
--network_module="lycoris.kohya" ^
--shuffle_caption ^
--max_train_epochs=1000 ^
--save_every_n_steps=100 ^
--save_state_on_train_end ^
--save_precision=bf16 ^
--train_batch_size=1 ^
--gradient_accumulation_steps=1 ^
--max_data_loader_n_workers=1 ^
--mixed_precision="bf16" ^
--caption_extension=".txt" ^
--gradient_checkpointing ^
--network_dim=64 ^
--network_alpha=64 ^
--optimizer_type="prodigyplus.prodigy_plus_schedulefree.ProdigyPlusScheduleFree" ^
--optimizer_args "prodigy_steps=100" "betas=(0.8, 0.8)" "schedulefree_c=10" "weight_decay_by_lr=False" """
GUIDE_TRAINING += r""""d0=1e-5" "use_stableadamw=False" "d_limiter=False" "d_coef=1" "use_speed=False" ^
--learning_rate=1 ^
--loss_type="fft" ^
--flow_matching ^
--flow_matching_objective="vector_field" ^
--flow_matching_shift=2.5 ^
--color_aug ^
--flip_aug ^
--random_crop ^
--caption_dropout_rate=0.5 ^
--network_dropout=0.1 ^
--enable_bucket ^
--bucket_reso_steps=64 ^
--min_bucket_reso=768 ^
--max_bucket_reso=1280 ^
--xformers ^
--vae="K:/ComfyUI_p022/ComfyUI/models/vae/kohaku" ^
--network_weights="K:/Comfyui_033/ComfyUI/models/loras/train/ext_big25_fix.safetensors" ^
--full_bf16 ^
--mem_eff_attn ^
--lr_scheduler="constant" ^
--seed=1 ^
--no_metadata ^
--logging_dir="logs" ^
--log_with="tensorboard" ^
--persistent_data_loader_workers ^That’s it — the training starts.
"""

SHORT = (
    "sdxl_train_network.py --pretrained_model_name_or_path m.safetensors --train_data_dir d --output_dir o"
)


def converted(flags: str = "", *, script: str = SHORT) -> ImportedRecipe:
    return import_command(parse_command(f"{script} {flags}"), folder=Path())


def recipe(flags: str = "", *, script: str = SHORT) -> dict[str, Any]:
    return nested(converted(flags, script=script).settings)


def result_of(flags: str, name: str) -> str:
    """Return the line about the flag `name`."""
    return next(str(r) for r in converted(flags).results if r.flag.name == name)
