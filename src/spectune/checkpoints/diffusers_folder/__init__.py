"""Folders of StableDiffusionXLPipeline as checkpoints with the tensors of a single file.

| module | holds |
| --- | --- |
| `reader` | a folder as a checkpoint |
| `subfolder` | the weights of one part: which file, which keys |
| `config` | the facts in configurations that no tensor determines |
| `writer` | a folder from the tensors of a single file |
| `small_files` | configurations and tokenizers to write: a template's or new ones |
| `default_configs` | new configurations from a layout |
| `keys` | the names of subfolders, files and keys |
"""
