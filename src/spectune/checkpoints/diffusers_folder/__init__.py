"""Checkpoints in the form of a diffusers folder."""
