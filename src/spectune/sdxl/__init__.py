"""Facts about SDXL: its layout, the names of its tensors, its layers and its vocabulary."""
