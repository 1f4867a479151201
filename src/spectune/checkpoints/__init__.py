"""Whole checkpoints on disk, always under the tensor names of a single file.

| module | holds |
| --- | --- |
| `open` | `open_checkpoint` and `open_writer`: a single file, shards with an index, or a diffusers folder |
| `plain_weights` | refuses scaled fp8, NF4 and int8 weights, which are no values by themselves |
| `diffusers_folder` | folders of StableDiffusionXLPipeline |
"""
