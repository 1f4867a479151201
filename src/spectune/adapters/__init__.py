"""Read and write adapter files in the key spellings of all supported programs.

| module | contents |
| --- | --- |
| adapter | adapters in memory: a low-rank pair, a delta or another change per layer, read on access |
| general | read the other kinds: LoHa, LoKr, DoRA, differences of biases and norms |
| kinds | how each kind of adapter changes a weight |
| detect | tell adapters from checkpoints |
| spellings | map the keys of other programs to layers and back |
| alphas | read alphas from tensors and from PEFT's configuration, and warn about them |
| reader | open the adapter of any program for the layers of a model |
| writer | write LoRAs, principals and tuned adapters |
| traits | named groups of layers, for slices |
| programs | the table of what each program loads |
| loading | find the features of a file and look them up in that table |
"""
