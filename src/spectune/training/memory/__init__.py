"""Estimate the GPU memory of a run, and find settings that fit a GPU.

account: records of the settings and of the bytes that they need.
meter: measure the memory of given settings.
step: run a training step on the meta device.
meta_model: models and frames on the meta device.
live_bytes: count the bytes that are allocated at once.
optimizer_state: measure an optimizer's state.
search: find settings that fit a GPU.
"""
