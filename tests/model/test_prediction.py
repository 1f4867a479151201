"""Noising, targets and inverses against diffusers and hand-computed values."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from spectune.errors import InputError
from spectune.files.source import MemorySource
from spectune.model.network import source_prediction
from spectune.model.noise_levels import LogitNormal
from spectune.model.prediction import Ddpm, Flow, alphas_cumprod, make_prediction

LATENTS = (5, 4, 6, 7)


@pytest.fixture
def x0() -> torch.Tensor:
    return torch.randn(LATENTS, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(LATENTS, generator=torch.Generator().manual_seed(2))


TIMES = torch.tensor([0, 17, 500, 998, 999])


def test_ddpm_matches_diffusers(x0, noise):
    oracle = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(
        Ddpm().add_noise(x0, noise, TIMES), oracle.add_noise(x0, noise, TIMES), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        Ddpm("v").target(x0, noise, TIMES), oracle.get_velocity(x0, noise, TIMES), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("prediction", "times"),
    [
        (Ddpm("eps"), TIMES),
        (Ddpm("v"), TIMES),
        (Flow(shift=2.5), torch.tensor([0.01, 0.3, 0.5, 0.936, 0.999])),
        (Ddpm("v", zero_terminal_snr=True), TIMES),
        (Ddpm("eps", zero_terminal_snr=True), TIMES.clamp(max=990)),
    ],
    ids=["eps", "v", "flow", "v, zero SNR", "eps, zero SNR"],
)
def test_a_perfect_output_recovers_the_image_and_the_noise(prediction, times, x0, noise):
    noised = prediction.add_noise(x0, noise, times)
    output = prediction.target(x0, noise, times)
    torch.testing.assert_close(prediction.x0(noised, output, times), x0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(prediction.noise(noised, output, times), noise, rtol=1e-3, atol=1e-4)
    wrong = prediction.x0(noised, output * 1.01, times)
    assert not torch.allclose(wrong, x0, rtol=1e-3, atol=1e-4)


def preconditioning(prediction, times):
    """Return c_skip, c_out and c_noise of the table in prediction.py, in float64."""
    if isinstance(prediction, Flow):
        return torch.ones_like(times), -times, 1000 * times
    alpha_squared = alphas_cumprod()[times]
    alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
    return (1 / alpha, -sigma / alpha, times) if prediction.name == "eps" else (alpha, -sigma, times)


@pytest.mark.parametrize(
    ("prediction", "times"),
    [(Ddpm("eps"), TIMES), (Ddpm("v"), TIMES), (Flow(), torch.tensor([0.01, 0.3, 0.5, 0.936, 0.999]))],
    ids=["eps", "v", "flow"],
)
def test_x0_follows_the_table_of_preconditioning(prediction, times, x0, noise):
    c_skip, c_out, c_noise = preconditioning(prediction, times)
    noised, output = x0, noise  # the table holds for any input and output
    for scale, close in ((1.0, True), (1.01, False)):
        expected = c_skip.view(-1, 1, 1, 1) * noised + scale * c_out.view(-1, 1, 1, 1) * output
        result = prediction.x0(noised, output, times)
        assert torch.allclose(result.double(), expected.double(), rtol=1e-4, atol=1e-5) == close
    assert torch.equal(prediction.timestep(times), c_noise)


def test_flow_by_hand():
    one, two = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    flow, level = Flow(shift=2.5), torch.tensor([0.25])
    assert flow.add_noise(one, two, level).item() == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert flow.target(one, two, level).item() == 2.0
    assert flow.timestep(level).item() == 250.0
    assert flow.snr(level).item() == pytest.approx(9.0)
    # r*s/(1+(r-1)*s) at s = 1/2, r = 2.5
    assert flow.shifted(torch.tensor([0.5])).item() == pytest.approx(1.25 / 1.75)


def test_flow_shift_matches_the_sampler_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    torch.testing.assert_close(scheduler.sigmas, Flow(shift=2.5).shifted(plain.sigmas))
    torch.testing.assert_close(scheduler.timesteps, Flow(shift=2.5).timestep(scheduler.sigmas))


def test_snr_of_sdxl_schedule():
    # sqrt(alpha_bar) of SDXL's published schedule is 0.9996 at the first step and 0.0683 at the last
    snr = Ddpm().snr(torch.tensor([0, 999]))
    assert snr[0].item() == pytest.approx(0.99915 / 0.00085, rel=1e-4)
    assert snr[1].item() == pytest.approx(0.0683**2 / (1 - 0.0683**2), rel=5e-3)


def test_even_times_by_hand():
    assert Ddpm().even_times(4).tolist() == [125, 375, 625, 875]
    torch.testing.assert_close(Flow().even_times(2), torch.tensor([0.25, 0.75]))


def test_flow_bridge_to_eps(x0, noise):
    """An exact eps model is a flow model at s = sigma/(alpha+sigma): v = (eps - x_flow)/(1-s)."""
    times = torch.tensor([50, 200, 500, 700, 900])
    ratio = Ddpm().snr(times).sqrt()  # alpha/sigma
    level = 1 / (1 + ratio)
    flow = Flow()
    x_flow = flow.add_noise(x0, noise, level)
    bridge = (noise - x_flow) / (1 - level.view(-1, 1, 1, 1))
    torch.testing.assert_close(bridge, flow.target(x0, noise, level), rtol=1e-4, atol=1e-4)


def test_an_unknown_name_and_an_invalid_shift_are_errors():
    with pytest.raises(InputError, match="unknown prediction type 'epsilon': expected one of eps, v, flow"):
        make_prediction("epsilon")
    with pytest.raises(InputError, match="flow shift -1 is not positive"):
        make_prediction("flow", flow_shift=-1)


# ---------------------------------------------------------------- zero terminal SNR


def test_rescaled_schedule_matches_diffusers():
    oracle = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    alpha_squared = oracle.alphas_cumprod
    expected = alpha_squared / (1 - alpha_squared)
    snr = Ddpm("v", zero_terminal_snr=True).snr(torch.arange(1000))
    torch.testing.assert_close(snr[:990], expected[:990], rtol=1e-3, atol=0)
    assert snr[999].item() == 0.0
    assert snr[0].item() == pytest.approx(0.99915 / 0.00085, rel=1e-4)  # the first step is unchanged
    assert not torch.allclose(Ddpm().snr(torch.arange(1000)), snr, rtol=0.01)


def test_last_step_by_hand():
    v, last = Ddpm("v", zero_terminal_snr=True), torch.tensor([999])
    x0, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -0.5)
    # alpha = 0, sigma = 1: x_t is the noise, v is -x0
    assert v.add_noise(x0, noise, last).item() == -0.5
    assert v.target(x0, noise, last).item() == -2.0
    assert v.x0(noise, torch.full_like(x0, -2.0), last).item() == 2.0
    assert v.noise(noise, torch.full_like(x0, -2.0), last).item() == -0.5


def test_eps_skips_the_step_of_pure_noise():
    eps, v = Ddpm("eps", zero_terminal_snr=True), Ddpm("v", zero_terminal_snr=True)
    drawn = {kind.name: kind.sample_times(50_000, torch.Generator().manual_seed(0)) for kind in (eps, v)}
    assert drawn["eps"].max().item() == 998
    assert drawn["v"].max().item() == 999
    assert eps.even_times(999).tolist() == list(range(999))
    assert v.even_times(1000)[-1].item() == 999
    with pytest.raises(AssertionError, match="eps does not determine x0"):
        eps.x0(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor([999]))


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (["v_pred", "ztsnr"], Ddpm("v", zero_terminal_snr=True)),
        (["ztsnr"], Ddpm("eps", zero_terminal_snr=True)),
        (["v_pred"], Ddpm("v")),
        ([], Ddpm("eps")),
    ],
)
def test_checkpoints_declare_their_schedule(tensors, expected):
    assert source_prediction(MemorySource({name: torch.empty(0) for name in tensors}, {})) == expected


# ---------------------------------------------------------------- noise levels of flow


def test_logit_normal_by_hand():
    levels = LogitNormal(mean=-0.5, std=2.0)
    # the median is sigmoid(mean); 84.13% of a normal distribution lie below mean + std
    result = levels.quantiles(torch.tensor([0.5, 0.841345]))
    expected = [1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-1.5))]
    assert result.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("flow", [Flow(2.5), Flow(levels=LogitNormal(-0.5, 2.0)), Flow(3.0, LogitNormal())])
def test_even_times_are_the_quantiles_of_random_times(flow):
    drawn = flow.sample_times(200_000, torch.Generator().manual_seed(0)).sort().values
    even = flow.even_times(8)
    # a share of (i + 1/2)/8 of the samples lies below the i-th
    below = torch.searchsorted(drawn, even) / len(drawn)
    torch.testing.assert_close(below, (torch.arange(8) + 0.5) / 8, rtol=0, atol=0.005)
    assert torch.equal(even, flow.even_times(8))
    assert not torch.allclose(even, Flow().even_times(8), atol=0.01)


def test_shift_by_resolution():
    flow = Flow(shift="resolution")
    assert flow.shift_at(1024 * 1024) == 1.0
    assert flow.shift_at(512 * 512) == 0.5
    # r = 2 at s = 1/2: 1/(1 + 1/2)
    assert flow.shifted(torch.tensor([0.5]), pixels=2048 * 2048).item() == pytest.approx(2 / 3)
    assert torch.equal(flow.even_times(3, pixels=2048**2), Flow(2.0).even_times(3))
    assert Flow(2.5).shift_at(512 * 512) == 2.5
    with pytest.raises(ValueError, match="image area"):
        flow.even_times(3)


def test_ends_of_flow_are_clean_latents_and_pure_noise(x0, noise):
    flow, ends = Flow(shift=2.5), torch.tensor([0.0, 1.0])
    assert flow.snr(ends).tolist() == [math.inf, 0.0]
    assert flow.shifted(ends).tolist() == [0.0, 1.0]
    noised = flow.add_noise(x0[:2], noise[:2], ends)
    torch.testing.assert_close(noised, torch.stack([x0[0], noise[1]]))


def test_options_of_other_kinds_are_ignored():
    assert make_prediction("flow", flow_shift="resolution", zero_terminal_snr=True) == Flow("resolution")
    assert make_prediction("v", flow_shift=3.0, zero_terminal_snr=True) == Ddpm("v", True)
    assert make_prediction("flow", flow_levels=LogitNormal()) == Flow(1.0, LogitNormal(0.0, 1.0))
