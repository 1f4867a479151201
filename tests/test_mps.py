"""Test on a simulated GPU of a Mac that no float64 tensor lands there, and that all decompositions run."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from spectune.core.split import split_weight
from spectune.core.svd import Method, top_singular
from spectune.model.noise_levels import LogitNormal
from spectune.model.prediction import Ddpm, Flow, Prediction
from spectune.sampling.generate import make_scheduler
from spectune.training.eps_to_flow.bridge import Bridge
from spectune.training.objective.losses import LOSSES, HuberThreshold
from spectune.training.objective.noising import NoiseOptions, noise_at_random
from tests.simulated_mps import MpsTensor, SimulatedMps

PREDICTIONS = [Ddpm("eps"), Ddpm("v", zero_terminal_snr=True), Flow(2.5), Flow("resolution", LogitNormal())]


def test_the_simulation_refuses_what_a_mac_refuses() -> None:
    with SimulatedMps():
        tensor = torch.ones(2, 2).to("mps")
        assert tensor.T.device.type == "mps"
        assert type(tensor.cpu()) is Tensor
        with pytest.raises(TypeError, match="float64"):
            tensor.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, dtype=torch.float64, device="mps")
        with pytest.raises(RuntimeError, match="same device"):
            tensor.add(torch.ones(2))
        with pytest.raises(NotImplementedError, match="linalg_qr"):
            torch.linalg.qr(tensor)


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize(("shape", "rank"), [((100, 64), 8), ((200, 300), 64), ((600, 700), 8)])
def test_every_svd_runs_and_agrees_with_the_cpu(shape: tuple[int, int], rank: int, method: Method) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = top_singular(matrix, rank, method)
    with SimulatedMps():
        found = top_singular(matrix.to("mps"), rank, method)
        assert (type(found.u), found.u.dtype, found.method) == (MpsTensor, torch.float32, expected.method)
        singular_values = found.s.cpu()
    torch.testing.assert_close(singular_values, expected.s, rtol=1e-4, atol=0)


def test_a_weight_is_split_with_its_svd_on_the_gpu() -> None:
    weight = torch.randn(200, 150, generator=torch.Generator().manual_seed(0)).half()
    expected = split_weight(weight, rank=8)
    with SimulatedMps():
        found = split_weight(weight, rank=8, device="mps")
        assert type(found.low_rank.up) is Tensor
    assert found.report.energy == pytest.approx(expected.report.energy, rel=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
def test_noise_targets_and_losses_are_float32(prediction: Prediction) -> None:
    with SimulatedMps():
        x0 = torch.randn(2, 4, 8, 8).to("mps")
        noised = noise_at_random(
            prediction, x0, torch.Generator().manual_seed(0), noise=NoiseOptions(0.1, 0.1)
        )
        assert {type(noised.latents), type(noised.target), type(noised.snr)} == {MpsTensor}
        for inverse in (prediction.x0, prediction.noise):
            if getattr(prediction, "name", "") != "eps":
                assert inverse(noised.latents, noised.target, noised.times).dtype == torch.float32
        thresholds = HuberThreshold().at(noised.snr)
        for loss in LOSSES.values():
            costs = loss(noised.latents, noised.target, huber_c=thresholds)
            assert (type(costs), costs.dtype) == (MpsTensor, torch.float32)
        bridge = Bridge().at(torch.rand(2).to("mps"))
        assert {type(bridge.c_in), type(bridge.timestep)} == {MpsTensor}


@pytest.mark.parametrize(
    ("prediction", "sampler"),
    [
        *((Ddpm(), sampler) for sampler in ("euler", "euler_a", "ddim", "dpmpp_2m")),
        (Ddpm("v", zero_terminal_snr=True), "euler"),
        *((Flow(2.5), sampler) for sampler in ("euler", "heun")),
    ],
)
def test_every_sampler_runs(prediction: Prediction, sampler: str) -> None:
    with SimulatedMps():
        scheduler = make_scheduler(prediction, sampler, pixels=64 * 64)
        scheduler.set_timesteps(3, device=torch.device("mps"))
        latents = torch.randn(1, 4, 8, 8).to("mps")
        for timestep in scheduler.timesteps:
            extra = {"generator": torch.Generator()} if sampler == "euler_a" else {}
            latents = scheduler.step(latents / 2, timestep, latents, **extra).prev_sample
            assert latents.dtype == torch.float32
