"""GPU memory that a run needs, and the settings that fit a card.

account: the settings and the resulting bytes, as records.
meter: measure the memory of given settings.
step: a training step on the meta device.
meta_model: models and frames on the meta device.
live_bytes: count the bytes that are alive at once.
optimizer_state: bytes of an optimizer's state.
search: choose the settings that fit a card.
"""
