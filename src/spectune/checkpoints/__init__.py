"""Open and write complete checkpoints on disk, always with the tensor names of a single file.

| module | holds |
| --- | --- |
| `open` | `open_checkpoint` and `open_writer`: a single file, shards with an index, or a diffusers folder |
| `plain_weights` | refuse scaled fp8, NF4 and int8 weights, which cannot be read without stored scales |
| `diffusers_folder` | read and write folders of StableDiffusionXLPipeline |
"""
