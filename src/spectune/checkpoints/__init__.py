"""Open and write complete checkpoints on disk, always with the tensor names of a single file.

| module | holds |
| --- | --- |
| `open` | `open_checkpoint` and `open_writer`: a single file, shards with an index, or a diffusers folder |
| `scaled_fp8` | decode scaled fp8 of ComfyUI: weights are multiplied by their stored scales |
| `ema` | moving averages of the UNet, which older trainers stored beside it |
| `plain_weights` | refuse NF4, int8 and other weights that cannot be decoded |
| `diffusers_folder` | read and write folders of StableDiffusionXLPipeline |
"""
