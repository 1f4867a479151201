"""Open and write complete checkpoints on disk, always with the tensor names of a single file.

| module | holds |
| --- | --- |
| `open` | `open_checkpoint` and `open_writer`: a single file, shards with an index, or a diffusers folder |
| `ema` | moving averages of the UNet, which older trainers stored beside it |
| `plain_weights` | refuse NF4, int8 and other quantized weights, and decode scaled fp8 with `scaled_fp8` |
| `diffusers_folder` | read and write folders of StableDiffusionXLPipeline |
"""
