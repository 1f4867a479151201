"""Read and write folders of StableDiffusionXLPipeline, with the tensor names of a single file.

| module | holds |
| --- | --- |
| `reader` | open a folder as a checkpoint |
| `subfolder` | open the weights of one part: choose the file, map the keys |
| `config` | read the facts in configurations that no tensor determines |
| `writer` | write a folder from the tensors of a single file |
| `small_files` | the configurations and tokenizers to write, from a template or new |
| `default_configs` | build new configurations from a layout |
| `keys` | the names of subfolders, files and keys |
"""
