"""Facts about SDXL: sizes, names, layers and vocabulary; no file is opened here.

| module | holds |
| --- | --- |
| `layout` | the sizes of the parts, the prefixes of their tensors, the metadata `spectune.layout` |
| `inference` | a layout from the shapes of tensors, in sgm or diffusers spelling |
| `names` | which key is layer X in program Y: the tables of all modules and their spellings |
| `state_dicts` | a single file's tensors as state dicts of the running modules, and back |
| `layers` | one record per layer that can be factored, and the catalogue of all |
| `selection` | the words and patterns that select layers |
| `vocabulary` | CLIP's words and the files of its tokenizers |
"""
