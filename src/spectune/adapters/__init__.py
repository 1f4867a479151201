"""Adapter files: reading and writing them in the spellings of all programs.

| module | contents |
| --- | --- |
| adapter | adapters in memory: a low-rank pair or a delta per layer, read on access |
| spellings | tables from the keys of other programs to layers and back |
| alphas | alphas from tensors and from PEFT's configuration, and warnings about them |
| reader | opening an adapter of any program for the layers of a model |
| writer | writing LoRAs, principals and tuned adapters |
| traits | named groups of layers, for slices |
| programs | the table of which program loads what |
| loading | the features of a file, looked up in that table |
"""
