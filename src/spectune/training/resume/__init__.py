"""Resuming a run: what may change, which state is used, and what is saved after an error."""
