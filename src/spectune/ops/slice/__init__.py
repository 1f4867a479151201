"""Combining parts of adapters and of checkpoints."""
