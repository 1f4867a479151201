"""A running SDXL: modules built from a checkpoint, tokenizers, adapters in place, prediction types."""
