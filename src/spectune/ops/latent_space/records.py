"""The report of a move to another latent space. It loads no network library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MovedLatents:
    """The latents of the old and the new model."""

    channels_before: int
    channels: int
    init: str  # zeros, copy or fit
    vae: str | None  # file of the new autoencoder
    has_vae: bool = False
    pictures: int = 0  # that the convolutions were fitted to
    # relative squared errors on these pictures; None without a fit
    first_error: float | None = None  # of the outputs of conv_in
    before_error: float | None = None  # of the prediction with copies
    error: float | None = None  # of the prediction
