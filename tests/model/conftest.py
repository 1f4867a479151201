"""Frames of the tiny SDXL that the tests of this folder share."""

import pytest
import torch

from spectune.core.split import split_weight
from spectune.model.text import tokenize
from spectune.sdxl.layers import build_catalogue, layer_weight


@pytest.fixture(scope="session")
def frames(source):
    """Return frames of rank 4 of all default layers, by layer name."""
    return {
        layer.name: split_weight(layer_weight(source, layer), rank=4, store=torch.float32).low_rank
        for layer in build_catalogue(source)
    }


@pytest.fixture(scope="session")
def predict():
    """Return a function that runs a model on two fixed latents with captions at timesteps 10 and 700."""

    def run(model):
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).to(model.unet.dtype)
        text = model.encode_text(tokenize(["a cat", "two dogs"], model.layout.te1.context))
        return model.denoise(x, torch.tensor([10, 700]), text, torch.full((2, 6), 64.0))

    return run
