"""Text to image with the schedulers of diffusers."""

import numpy as np
import pytest
import torch

from spectune.errors import InputError
from spectune.files.source import MemorySource
from spectune.model.network import build_model
from spectune.model.offload import StagedModel
from spectune.model.prediction import Ddpm, Flow
from spectune.model.text import tokenize
from spectune.sampling.generate import Request, SampleSettings, make_scheduler, sample_latents
from spectune.sampling.stages import draw_in_stages

REQUESTS = [Request("a cat", 1), Request("a dog", 2), Request("a cat", 1)]


@pytest.fixture(scope="module")
def models(source):
    def declared(prediction, *markers):
        metadata = {**source.metadata, "spectune.prediction": prediction, "spectune.flow_shift": "2.5"}
        values = {**source.values, **dict.fromkeys(markers, torch.empty(0))}
        return build_model(MemorySource(values, metadata))

    return {name: declared(name) for name in ("eps", "v", "flow")} | {"ztsnr": declared("v", "ztsnr")}


def settings_for(model, **changes):
    """Return settings with a size that the model accepts."""
    step = model.pixels_per_latent * 2 ** (len(model.layout.unet.channels) - 1)
    return SampleSettings(
        **{"width": 2 * step, "height": step, "steps": 3, "cfg": 3.0, "batch": 4, **changes}
    )


@pytest.mark.parametrize(
    ("prediction", "sampler"),
    [
        ("eps", "euler"),
        ("eps", "euler_a"),
        ("eps", "ddim"),
        ("eps", "dpmpp_2m"),
        ("v", "euler"),
        ("ztsnr", "euler"),
        ("flow", "euler"),
        ("flow", "heun"),
    ],
)
def test_every_sampler_is_reproducible(models, prediction, sampler):
    model = models[prediction]
    settings = settings_for(model, sampler=sampler)
    done = []
    first, second, again = draw_in_stages(StagedModel(model), REQUESTS, settings, progress=done.append)
    assert first.size == (settings.width, settings.height)
    assert done == [3]
    assert np.array_equal(first, again), "same caption and seed, same picture"
    assert not np.array_equal(first, second)
    assert [
        np.array_equal(a, b)
        for a, b in zip(
            draw_in_stages(StagedModel(model), REQUESTS, settings), [first, second, again], strict=True
        )
    ] == [True] * 3


def test_a_perfect_network_is_sampled_to_its_image():
    """Compare the schedulers with our prediction records: a network that knows x0 samples x0."""
    x0 = torch.full((1, 4, 2, 2), 0.7)
    for prediction in (Ddpm("eps"), Ddpm("v"), Flow(shift=2.5)):
        scheduler = make_scheduler(prediction, "euler")
        scheduler.set_timesteps(40)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        flow = isinstance(prediction, Flow)
        latents = noise * (1.0 if flow else scheduler.init_noise_sigma)
        for timestep in scheduler.timesteps:
            model_input = latents if flow else scheduler.scale_model_input(latents, timestep)
            times = (timestep / 1000 if flow else timestep.long()).view(1)
            # the noise that turns x0 into this input
            zero = torch.zeros_like(x0)
            level = prediction.add_noise(zero, torch.ones_like(x0), times)
            implied = (model_input - prediction.add_noise(x0, zero, times)) / level
            output = prediction.target(x0, implied, times)
            latents = scheduler.step(output, timestep, latents).prev_sample
        torch.testing.assert_close(latents, x0, rtol=0, atol=0.05)


def test_cfg_1_ignores_the_negative_prompt(models):
    model = models["eps"]
    plain = sample_latents(model, REQUESTS[:1], settings_for(model, cfg=1.0))
    guided = sample_latents(model, REQUESTS[:1], settings_for(model, cfg=1.0, negative="fog"))
    assert torch.equal(plain, guided), "without guidance, the negative prompt has no effect"
    assert not torch.equal(plain, sample_latents(model, REQUESTS[:1], settings_for(model, cfg=3.0)))


def test_an_invalid_size_or_sampler_is_an_error(models):
    with pytest.raises(InputError, match="width 33 is not a positive multiple of"):
        draw_in_stages(StagedModel(models["eps"]), REQUESTS, settings_for(models["eps"], width=33))
    with pytest.raises(InputError, match="no sampler 'ddim' for flow models") as caught:
        draw_in_stages(StagedModel(models["flow"]), REQUESTS, settings_for(models["flow"], sampler="ddim"))
    assert caught.value.hint == "choose one of euler, heun"
    with pytest.raises(InputError, match="did you mean `euler`"):
        make_scheduler(Ddpm(), "eular")


def test_a_zero_terminal_snr_model_is_sampled_from_pure_noise(models):
    """Check that the result is finite and differs from that of the v model, which has the same weights."""
    model, plain = models["ztsnr"], models["v"]
    assert model.prediction == Ddpm("v", zero_terminal_snr=True)
    latents = sample_latents(model, REQUESTS[:1], settings_for(model, steps=1, cfg=1.0))
    assert bool(latents.isfinite().all())
    # one step from alpha = 0 and sigma = 1: the input is the noise, and x0 is minus the output
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(1))[None]
    text = model.encode_text(tokenize(["a cat"], model.layout.te1.context))
    height, width = (side * model.pixels_per_latent for side in latents.shape[-2:])
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(latents, -model.denoise(noise, torch.tensor([999]), text, ids))
    assert not torch.allclose(
        latents, sample_latents(plain, REQUESTS[:1], settings_for(plain, steps=1, cfg=1.0))
    )
