"""Facts about SDXL: sizes, names, layers and vocabulary. Nothing here opens a model file.

| module | holds |
| --- | --- |
| `layout` | the sizes of the parts, the prefixes of their tensors, the metadata `spectune.layout` |
| `inference` | infer a layout from the shapes of tensors, with sgm or diffusers names |
| `names` | tables of all modules and their names in every program |
| `state_dicts` | map a single file's tensors to state dicts of the running modules, and back |
| `layers` | one record per layer that can be factored, and the catalogue of all layers |
| `selection` | select layers by words and patterns |
| `vocabulary` | CLIP's vocabulary and the files of its tokenizers |
"""
