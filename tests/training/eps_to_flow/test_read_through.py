"""Training an EPS or v model with the loss of flow: predictions, gradients by hand, and the written files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.model.network import build_model
from spectune.model.prediction import Ddpm, Flow
from spectune.ops.rebuild import rebuild
from spectune.sampling.generate import Request, SampleSettings, sample_latents
from spectune.training.callbacks import Callbacks
from spectune.training.data.dataset import Batch
from spectune.training.eps_to_flow.bridge import Bridge
from spectune.training.loop import train
from spectune.training.objective.noising import NoisedBatch, noise_latents
from spectune.training.output import adapter_file
from spectune.training.recipe.defaults import with_defaults
from spectune.training.run import Run
from spectune.training.setup import assemble
from tests.training.conftest import MakeRecipe

DEMO = Path(__file__).resolve().parents[3] / "demo"
BRIDGED = {"read_through": "bridge"}
PREDICTIONS = [Ddpm("eps"), Ddpm("v"), Ddpm("v", zero_terminal_snr=True)]


def bridged_run(make_recipe: MakeRecipe, prediction: Ddpm, **objective: Any) -> Run:
    section = {"kind": prediction.name, "zero_terminal_snr": prediction.zero_terminal_snr, **BRIDGED}
    recipe = make_recipe(objective={**section, **objective}, model={"parts": ["unet"]})
    return assemble(recipe, Accelerator(cpu=True), Callbacks())


def first_batch(run: Run) -> Batch:
    return next(run.data.first_batches(1, torch.device("cpu")))


def noised_at(prediction: Ddpm, steps: list[int], batch: Batch) -> tuple[NoisedBatch, NoisedBatch]:
    """Return the batch noised for the model's own loss, and by flow at the same noise levels."""
    x0, times = batch.latents, torch.tensor(steps)
    assert x0 is not None
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    levels = Bridge(prediction).levels[times].float()
    return noise_latents(prediction, x0, noise, times), noise_latents(Flow(), x0, noise, levels)


# ---------------------------------------------------------------- the bridge of v


def test_a_correct_v_gives_the_correct_velocity() -> None:
    x0, noise = torch.randn(2, 4, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    for prediction in PREDICTIONS[1:]:
        times = torch.tensor([0, 100, 700, 999])
        levels = Bridge(prediction).levels[times].float()
        noised = Flow().add_noise(x0, noise, levels)
        bridge = Bridge(prediction).at(levels)
        torch.testing.assert_close(
            bridge.network_input(noised), prediction.add_noise(x0, noise, times), rtol=1e-5, atol=1e-5
        )
        output = prediction.target(x0, noise, times)
        torch.testing.assert_close(bridge.velocity(output, noised), noise - x0, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(bridge.velocity(1.01 * output, noised), noise - x0, rtol=1e-3, atol=1e-3)


def test_the_coefficients_of_v_by_hand() -> None:
    # s = 1/2: alpha = sigma = 1/sqrt(2); s = 1 of zero terminal SNR: alpha = 0, sigma = 1
    middle = Bridge(Ddpm("v")).at(torch.tensor([0.5]))
    assert [middle.c_in.item(), middle.c_out.item(), middle.c_skip.item()] == pytest.approx(
        [2**0.5, 2**0.5, 0]
    )
    end = Bridge(PREDICTIONS[2]).at(torch.tensor([1.0]))
    assert [end.c_in.item(), end.c_out.item(), end.c_skip.item()] == [1, 1, 1]
    assert end.timestep.item() == 999
    assert Bridge(PREDICTIONS[2]).highest == 1.0


# ---------------------------------------------------------------- the objective


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
def test_at_step_0_the_prediction_is_the_velocity_of_the_model(
    make_recipe: MakeRecipe, prediction: Ddpm
) -> None:
    run = bridged_run(make_recipe, prediction)
    batch = first_batch(run)
    own, flow = noised_at(prediction, [40, 850], batch)
    with torch.no_grad():
        output = run.model.denoiser(own.latents, own.timestep, batch.captions, batch.time_ids)
        velocity = run.objective.predict(run.model.denoiser, flow, batch, step=0)
    # the samplers' way: noise and x0 that the output implies
    expected = prediction.noise(own.latents, output, own.times) - prediction.x0(
        own.latents, output, own.times
    )
    torch.testing.assert_close(velocity, expected, rtol=1e-3, atol=1e-3)


def gradients(run: Run, predicted: Tensor, noised: NoisedBatch) -> Tensor:
    loss = (predicted - noised.target).square().mean()
    trained = list(run.optimization.parameters.values())
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, trained)])


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
def test_the_gradient_is_that_of_the_models_own_loss_times_a_weight(
    make_recipe: MakeRecipe, prediction: Ddpm
) -> None:
    run = bridged_run(make_recipe, prediction)
    batch = first_batch(run)
    for step in (40, 850):
        own, flow = noised_at(prediction, [step, step], batch)
        output = run.model.denoiser(own.latents, own.timestep, batch.captions, batch.time_ids)
        ordinary = gradients(run, output, own)
        bridged = gradients(run, run.objective.predict(run.model.denoiser, flow, batch, step=0), flow)
        ratio = float(prediction.snr(torch.tensor([step])).sqrt())  # alpha/sigma
        alpha, sigma = (1 + ratio**-2) ** -0.5, (1 + ratio**2) ** -0.5
        # the error of the velocity is (1 + sigma/alpha) times that of eps, (alpha + sigma) times that of v
        weight = (1 + sigma / alpha) ** 2 if prediction.name == "eps" else (alpha + sigma) ** 2
        scale = float(bridged.abs().max())
        torch.testing.assert_close(bridged, weight * ordinary, rtol=1e-2, atol=1e-3 * scale)
        assert not torch.allclose(bridged, 1.05 * weight * ordinary, rtol=1e-2, atol=1e-3 * scale)


def test_noise_levels_are_those_of_the_schedule(make_recipe: MakeRecipe) -> None:
    run = bridged_run(make_recipe, Ddpm("eps"), flow_shift=2.5, flow_times_min=0.2)
    assert isinstance(run.objective.training_prediction, Flow)
    times = run.objective.training_prediction.sample_times(5000, torch.Generator().manual_seed(0))
    assert times.min() >= 0.2
    assert times.max() <= 0.937
    assert times.max() > 0.93
    assert run.objective.prediction == Ddpm("eps")


def test_the_file_stays_an_eps_model(make_recipe: MakeRecipe, picture_folder: Path) -> None:
    recipe = make_recipe(objective=BRIDGED, data={"validation_folder": picture_folder / "held_out"})
    direct = make_recipe(
        data={"validation_folder": picture_folder / "held_out"}, run={"output": recipe.run.output / "direct"}
    )
    report, other = train(recipe), train(direct)
    # both are measured as eps models
    assert report.validation_before == other.validation_before
    assert report.validation_after != other.validation_after
    with open_checkpoint(adapter_file(recipe.run.output, recipe.run.name)) as tuned:
        origin = tuned.provenance
    assert (origin.prediction, origin.flow_shift, origin.noise_schedule) == ("eps", None, "sdxl")


# ---------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"kind": "flow"}}, "is for eps and v: a flow model needs no bridge"),
        ({"objective": {"teacher": "eps"}}, "`teacher` converts the model to flow"),
        ({"objective": {"flow_timestep": "integer"}}, "`flow_timestep` does nothing with"),
        ({"objective": {"input_perturbation": 0.1}}, "`input_perturbation` is not for flow"),
        ({"objective": {"zero_terminal_snr": True}}, "needs a schedule without zero terminal SNR"),
        ({"objective": {"flow_times_max": 0.99}}, "`flow_times_max` is 0.99: .* covers 0.0283 to 0.9360"),
        (
            {"loss": {"weighting": "min_snr"}},
            "use none or edm2 for objective.read_through = .bridge., which has the loss",
        ),
        ({"objective": {"kind": "v"}, "loss": {"scale_v_like_noise": True}}, "is not for the loss of flow"),
    ],
)
def test_keys_that_do_not_fit(make_recipe: MakeRecipe, sections: dict[str, Any], message: str) -> None:
    objective = {**BRIDGED, **sections.get("objective", {})}
    with pytest.raises(InputError, match=message):
        with_defaults(make_recipe(**{**sections, "objective": objective}), "cpu")


def test_a_v_model_with_zero_terminal_snr_is_covered_to_the_end(make_recipe: MakeRecipe) -> None:
    objective = {**BRIDGED, "kind": "v", "zero_terminal_snr": True, "flow_times_max": 0.99}
    flow = make_recipe(objective=objective).objective.flow
    assert (flow.lowest, flow.highest) == (pytest.approx(0.0283, abs=1e-4), 0.99)


# ---------------------------------------------------------------- what it learns


@pytest.mark.slow
def test_the_rebuilt_checkpoint_draws_what_it_learned_as_an_eps_model(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    # eight repeats: a batch has eight noises
    folder, picture = tmp_path / "8_one", DEMO / "images" / "10_emoji3d" / "a_button_blood_type"
    folder.mkdir()
    for suffix in (".webp", ".txt"):
        shutil.copy(picture.with_suffix(suffix), folder)
    recipe = make_recipe(
        model={"base": DEMO / "base.safetensors", "rank": 16, "parts": ["unet"], "layers": ["unet.*"]},
        data={"folders": [tmp_path], "validation_folder": tmp_path, "resolution_px": 64},
        objective=BRIDGED,
        optimizer={"learning_rate": 5e-4},
        run={"steps": 60, "batch": 8},
    )
    report = train(recipe)
    before, after = report.validation_before, report.validation_after
    assert before is not None
    assert after is not None
    assert after < 0.3 * before  # the EPS loss, measured without the bridge
    tuned, rebuilt = adapter_file(recipe.run.output, "t"), tmp_path / "rebuilt.safetensors"
    rebuild(recipe.model.checkpoint, tuned, rebuilt, dtype="float32")
    caption = picture.with_suffix(".txt").read_text(encoding="utf-8").strip()
    image = Image.open(picture.with_suffix(".webp")).convert("RGB").resize((64, 64))
    pixels, distances = torch.from_numpy(np.array(image)), list[float]()
    for path in (recipe.model.checkpoint, rebuilt):
        with open_checkpoint(path) as source:
            model = build_model(source)
        assert model.prediction == Ddpm("eps")
        settings = SampleSettings(width=64, height=64, steps=15, cfg=1.0)
        latents = sample_latents(model, [Request(caption, seed) for seed in range(4)], settings)
        learned = model.encode_images(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)
        distances.append(float((latents - learned).square().mean()))
    assert distances[1] < 0.3 * distances[0], distances
