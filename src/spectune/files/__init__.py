"""Tensors on disk, one at a time, and the identity and origin of files.

* `source`: what every source of tensors by name has in common
* `reader`: open one safetensors file
* `shards`: read and write a checkpoint in several files with an index
* `writer`: write one safetensors file tensor by tensor, renamed only when complete
* `multi_file_writer`: the base of writers of several files
* `atomic_group`: several files that appear together or not at all
* `pipeline`: several threads read and compute, one writes, in order
* `provenance`: the `spectune.*` metadata, parsed once per file
* `weights_hash`: the hash of tensors, whatever the file around them
* `dtypes`, `dtype_names`: dtypes by name
"""
