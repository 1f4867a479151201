"""Read and write tensors on disk one at a time, and identify files and their origin.

* `source`: the interface of all sources of named tensors
* `reader`: open one safetensors file
* `shards`: read and write a checkpoint in several files with an index
* `tensor_writer`: the base class of all writers
* `writer`: write one safetensors file tensor by tensor, and rename it when it is complete
* `multi_file_writer`: the base class of writers of several files
* `rename`: rename a file, again if another program has it open
* `atomic_group`: several files that appear together or not at all
* `pipeline`: several threads read and compute, one writes, in order
* `provenance`: the `spectune.*` metadata, parsed once per file
* `weights_hash`: a hash of the tensors that does not depend on their file
* `dtypes`, `dtype_names`: dtypes by name
* `text`: text files in the encodings that people have
"""
