"""Tensors on disk: reading, writing, what a checkpoint consists of, and where files come from."""
