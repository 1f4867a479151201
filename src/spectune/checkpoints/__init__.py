"""Whole checkpoints on disk: single files, shards and diffusers folders."""
