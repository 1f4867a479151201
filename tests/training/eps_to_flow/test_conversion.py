"""Conversion from EPS to flow: the teacher, the warm start, the bridge, and the written files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.reader import open_any_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.model.network import build_model
from spectune.model.prediction import Flow
from spectune.ops.rebuild import rebuild
from spectune.sdxl.layers import build_catalogue
from spectune.training import output, state
from spectune.training.callbacks import Callbacks, StepInfo
from spectune.training.data.dataset import Batch
from spectune.training.eps_to_flow.bridge import Bridge
from spectune.training.eps_to_flow.conversion import Conversion, SwappedTensors, replaceable_parameters
from spectune.training.eps_to_flow.warm_start import refit_time
from spectune.training.loop import train
from spectune.training.objective.noising import NoisedBatch
from spectune.training.recipe.recipe import Recipe
from spectune.training.run import Run
from spectune.training.setup import assemble, restore
from spectune.training.validation import validation_loss
from tests.training.conftest import MakeRecipe

EMBEDDED = Path(__file__).resolve().parents[3] / "demo" / "base.safetensors"
FLOW = {"kind": "flow", "flow_shift": 2.5}
MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(make_recipe: MakeRecipe) -> MakeRun:
    def make(**objective: Any) -> Run:
        recipe = converting(make_recipe, objective)
        return assemble(recipe, Accelerator(cpu=True), Callbacks())

    return make


def converting(make_recipe: MakeRecipe, objective: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    model = {"frame": "plain", "layers": ["unet.*attn2*", "unet.out.2"], "parts": ["unet"]}
    sections["model"] = {**model, **sections.get("model", {})}
    warm = {"warm_images": 8} if objective.get("start") == "warm" else {}
    return make_recipe(objective={**FLOW, **warm, **objective}, **sections)


def first_batch(run: Run) -> tuple[Batch, NoisedBatch]:
    batch = next(run.data.first_batches(1, torch.device("cpu")))
    return batch, run.objective.noised(batch)


def predict_as_flow(run: Run, batch: Batch, noised: NoisedBatch) -> Tensor:
    return run.model.denoiser(noised.latents, noised.timestep, batch.captions, batch.time_ids)


def through_the_bridge(run: Run, batch: Batch, noised: NoisedBatch) -> Tensor:
    """Compute the velocity of the unchanged base. Of the tested code, this uses only the bridge."""
    assert run.recipe.model.base is not None
    with open_checkpoint(run.recipe.model.base) as source:
        base = build_model(source)
    bridge = Bridge().at(noised.times)
    text = run.model.denoiser.text_states(batch.captions)
    output = base.denoise(bridge.network_input(noised.latents), bridge.timestep, text, batch.time_ids)
    return bridge.velocity(output, noised.latents).detach()


def change_deltas(run: Run) -> None:
    with torch.no_grad():
        for parameter in run.optimization.parameters.values():
            parameter.add_(0.05)


@pytest.mark.parametrize("start", ["raw", "warm"])
@pytest.mark.slow
def test_the_teacher_does_not_depend_on_the_training(make_run: MakeRun, start: str) -> None:
    run = make_run(teacher="eps", start=start)
    change_deltas(run)
    batch, noised = first_batch(run)
    conversion = run.objective.conversion
    assert conversion is not None
    share = conversion.teacher_share(noised.times).view(-1, 1, 1, 1)
    without = noised_without_teacher(run)
    expected = torch.lerp(without.target, through_the_bridge(run, batch, noised), share)
    assert torch.allclose(noised.target, expected, atol=1e-4)
    assert not torch.allclose(noised.target, without.target, atol=1e-2)


def noised_without_teacher(run: Run) -> NoisedBatch:
    """Return the same noised batch with the target of the images."""
    recipe = run.recipe.model_copy(
        update={
            "objective": run.recipe.objective.model_copy(
                update={"teacher": "none", "start": "raw", "warm_images": 256}
            )
        }
    )
    return first_batch(assemble(recipe, Accelerator(cpu=True), Callbacks()))[1]


def test_the_teacher_fades_out_at_the_end_of_its_schedule() -> None:
    share = Conversion().teacher_share(torch.tensor([0.0, 0.9, 0.918, 0.936, 1.0]))
    assert share.tolist() == pytest.approx([1, 1, 0.5, 0, 0], abs=2e-3)


def test_a_bridged_run_starts_with_the_predictions_of_its_base(make_run: MakeRun) -> None:
    run = make_run(bridge_steps=4)
    batch, noised = first_batch(run)
    first = run.objective.predict(run.model.denoiser, noised, batch, step=0)
    assert torch.allclose(first, through_the_bridge(run, batch, noised), atol=1e-4)


def test_a_bridged_run_ends_as_a_flow_model(make_run: MakeRun) -> None:
    run = make_run(bridge_steps=4)
    batch, noised = first_batch(run)
    raw = predict_as_flow(run, batch, noised)
    for step in (4, 9):
        assert torch.equal(run.objective.predict(run.model.denoiser, noised, batch, step=step), raw)
    assert not torch.allclose(
        run.objective.predict(run.model.denoiser, noised, batch, step=2), raw, atol=1e-3
    )


def test_the_warm_start_reduces_the_error_against_the_bridge(make_run: MakeRun) -> None:
    raw, warm = make_run(), make_run(start="warm")
    errors: list[float] = []
    for run in (raw, warm):
        batch, noised = first_batch(run)
        expected = through_the_bridge(run, batch, noised)
        predicted = predict_as_flow(run, batch, noised).detach()
        errors.append(float((predicted - expected).square().mean()))
    assert errors[1] < 0.95 * errors[0]  # the tiny model is random: there is little to refit


def test_the_warm_start_refits_the_embedding_of_noise_levels() -> None:
    with open_checkpoint(EMBEDDED) as source:
        model = build_model(source)
    levels = Flow(shift=2.5).even_times(300)

    def embedded(times: Tensor) -> Tensor:
        return model.unet.time_embedding(model.unet.time_proj(times))

    expected, unfitted = embedded(Bridge().timestep(levels)), embedded(1000 * levels)
    SwappedTensors().put(model, refit_time(model, Bridge(), Flow(shift=2.5).even_times(4096)))
    refitted = embedded(1000 * levels)
    assert (refitted - expected).norm() < 0.05 * expected.norm() < 0.2 * (unfitted - expected).norm()


def test_the_teacher_uses_the_base_tensors_and_the_training_uses_the_warm_start(
    make_run: MakeRun,
) -> None:
    run = make_run(start="warm")
    conversion = run.objective.conversion
    assert conversion is not None
    with open_checkpoint(run.recipe.model.checkpoint) as base:
        stored = {name: base.load(name).float() for name in replaceable_parameters(run.model.sdxl)}
    warm = {name: tensor.clone() for name, tensor in replaceable_parameters(run.model.sdxl).items()}
    with conversion.base_weights(run.model.injection):
        inside = {name: tensor.clone() for name, tensor in replaceable_parameters(run.model.sdxl).items()}
    after = replaceable_parameters(run.model.sdxl)
    assert all(torch.equal(inside[name], tensor) for name, tensor in stored.items())
    assert all(torch.equal(after[name], tensor) for name, tensor in warm.items())
    assert sum(not torch.equal(warm[name], stored[name]) for name in stored) == 7  # conv_in keeps its bias


def test_the_rebuilt_model_equals_the_trained_model(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = converting(make_recipe, {"start": "warm", "teacher": "eps"})
    report = train(recipe)
    tuned = tmp_path / "out" / "t.safetensors"
    assert tuned in report.files
    with open_checkpoint(recipe.model.checkpoint) as base:
        catalogue = build_catalogue(base, all_layers=True)
    with open_any_adapter(tuned, catalogue) as adapter:
        assert isinstance(adapter, TunedAdapter)
        assert len(adapter.replaced) == 8
    rebuilt = tmp_path / "rebuilt.safetensors"
    rebuild(recipe.model.checkpoint, tuned, rebuilt, dtype=torch.float32)
    saved = state.load_state(output.saved_states(tmp_path / "out", "t")[-1])
    run = assemble(recipe, Accelerator(cpu=True), Callbacks(), saved)
    restore(run, saved)
    batch, noised = first_batch(run)
    run.model.denoiser.eval()
    with open_checkpoint(rebuilt) as source:
        model = build_model(source)
        assert model.prediction.name == "flow"
    text = run.model.denoiser.text_states(batch.captions)
    predicted = model.denoise(noised.latents, noised.timestep, text, batch.time_ids)
    expected = predict_as_flow(run, batch, noised)
    assert torch.allclose(predicted, expected, atol=2e-3)  # the other layers are rounded to fp16


class Losses(Callbacks):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, info: StepInfo) -> None:
        self.losses.append(info.loss)


@pytest.mark.slow
def test_a_resumed_conversion_continues_bit_for_bit(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole, rest = Losses(), Losses()
    objective = {"start": "warm", "teacher": "eps"}
    train(
        converting(make_recipe, objective, run={"output": tmp_path / "whole", "steps": 4}), callbacks=[whole]
    )
    parts = {"output": tmp_path / "parts", "steps": 2}
    train(converting(make_recipe, objective, run=parts))
    train(converting(make_recipe, objective, run={**parts, "steps": 4}), callbacks=[rest])
    assert rest.losses == whole.losses[2:]
    files = [(tmp_path / folder / "t.safetensors").read_bytes() for folder in ("whole", "parts")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_gradient_frames_are_computed_after_the_warm_start(
    make_recipe: MakeRecipe, picture_folder: Path
) -> None:
    recipe = converting(
        make_recipe,
        {"start": "warm", "teacher": "eps"},
        model={"frame": "gradient", "frame_batches": 1},
        data={"validation_folder": picture_folder / "held_out"},
    )
    run = assemble(recipe, Accelerator(cpu=True), Callbacks())
    before = validation_loss(
        run.model.denoiser, run.data.validation, run.objective.prediction, times=4, batch=2
    )
    assert train(recipe).validation_before == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"kind": "eps", "flow_shift": ..., "teacher": "eps"}, '`teacher` needs `kind = "flow"`'),
        ({"start": "warm", "bridge_steps": 5}, "set only one"),
        ({"warm_images": 5}, '`warm_images` does nothing without `start = "warm"`'),
    ],
)
def test_keys_that_exclude_each_other(
    make_recipe: MakeRecipe, objective: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        make_recipe(objective={**FLOW, **objective})
    assert message in str(caught.value)


def test_a_conversion_needs_the_delta_form(make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"need model\.form"):
        make_recipe(model={"form": "residual"}, objective={**FLOW, "teacher": "eps"})


def test_a_conversion_needs_an_eps_base(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = converting(make_recipe, {})
    train(recipe)
    flow = tmp_path / "flow.safetensors"
    rebuild(recipe.model.checkpoint, tmp_path / "out" / "t.safetensors", flow)
    with pytest.raises(InputError) as caught:
        train(converting(make_recipe, {"teacher": "eps"}, model={"base": flow}), force=True)
    assert "predicts flow" in str(caught.value)
