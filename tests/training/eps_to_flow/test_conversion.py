"""From EPS to flow: the teacher, the warm start, the fading bridge, and the files that they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError
from spectune.model.network import build_model
from spectune.model.prediction import Flow
from spectune.ops.rebuild import rebuild
from spectune.sdxl.layers import build_catalogue
from spectune.training import state
from spectune.training.callbacks import Callbacks, StepInfo
from spectune.training.eps_to_flow.bridge import Bridge
from spectune.training.eps_to_flow.conversion import Conversion
from spectune.training.eps_to_flow.warm_start import WarmStart, parameters, refit_time
from spectune.training.loop import train
from spectune.training.objective.target import Question
from spectune.training.recipe.recipe import Recipe
from spectune.training.setup import Run, assemble
from spectune.training.validation import held_out_loss
from tests.training.conftest import MakeRecipe

EMBEDDED = Path(__file__).resolve().parents[3] / "demo" / "base.safetensors"
FLOW = {"kind": "flow", "flow_shift": 2.5}
MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(make_recipe: MakeRecipe) -> MakeRun:
    def make(**objective: Any) -> Run:
        recipe = converting(make_recipe, objective)
        return assemble(recipe, Accelerator(cpu=True), Callbacks(), None)

    return make


def converting(make_recipe: MakeRecipe, objective: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    model = {"frame": "plain", "layers": ["unet.*attn2*", "unet.out.2"], "parts": ["unet"]}
    sections["model"] = {**model, **sections.get("model", {})}
    warm = {"warm_images": 8} if objective.get("start") == "warm" else {}
    return make_recipe(objective={**FLOW, **warm, **objective}, **sections)


def first_question(run: Run) -> tuple[Any, Question]:
    return next(run.asking.first(1, torch.device("cpu")))


def ask_raw(run: Run, batch: Any, question: Question) -> Tensor:
    return run.denoiser(question.noised, question.timestep, batch.captions, batch.time_ids)


def through_the_bridge(run: Run, batch: Any, question: Question) -> Tensor:
    """What the untouched base answers, without any of the code under test but the bridge."""
    assert run.recipe.model.base is not None
    with open_checkpoint(run.recipe.model.base) as source:
        base = build_model(source)
    reading = Bridge().at(question.times)
    text = run.denoiser.text_states(batch.captions)
    output = base.denoise(reading.feed(question.noised), reading.timestep, text, batch.time_ids)
    return reading.velocity(output, question.noised).detach()


def disturb(run: Run) -> None:
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.add_(0.05)


@pytest.mark.parametrize("start", ["raw", "warm"])
def test_the_teacher_is_the_base_whatever_was_trained(make_run: MakeRun, start: str) -> None:
    run = make_run(teacher="eps", start=start)
    disturb(run)
    batch, question = first_question(run)
    conversion = run.asking.conversion
    assert conversion is not None
    share = conversion.teacher_share(question.times).view(-1, 1, 1, 1)
    data = assemble_without_teacher(run)
    wanted = torch.lerp(data.target, through_the_bridge(run, batch, question), share)
    assert torch.allclose(question.target, wanted, atol=1e-4)
    assert not torch.allclose(question.target, data.target, atol=1e-2)


def assemble_without_teacher(run: Run) -> Question:
    """The same question with the pictures' own target."""
    recipe = run.recipe.model_copy(
        update={
            "objective": run.recipe.objective.model_copy(
                update={"teacher": "none", "start": "raw", "warm_images": 256}
            )
        }
    )
    return first_question(assemble(recipe, Accelerator(cpu=True), Callbacks(), None))[1]


def test_the_teacher_fades_out_where_its_schedule_ends() -> None:
    share = Conversion().teacher_share(torch.tensor([0.0, 0.9, 0.918, 0.936, 1.0]))
    assert share.tolist() == pytest.approx([1, 1, 0.5, 0, 0], abs=2e-3)


def test_a_bridged_run_begins_with_the_answers_of_its_base(make_run: MakeRun) -> None:
    run = make_run(bridge_steps=4)
    batch, question = first_question(run)
    first = run.asking.answer(run.denoiser, question, batch, step=0)
    assert torch.allclose(first, through_the_bridge(run, batch, question), atol=1e-4)


def test_a_bridged_run_ends_as_a_flow_model(make_run: MakeRun) -> None:
    run = make_run(bridge_steps=4)
    batch, question = first_question(run)
    raw = ask_raw(run, batch, question)
    for step in (4, 9):
        assert torch.equal(run.asking.answer(run.denoiser, question, batch, step=step), raw)
    assert not torch.allclose(run.asking.answer(run.denoiser, question, batch, step=2), raw, atol=1e-3)


def test_the_warm_start_comes_nearer_to_the_bridge(make_run: MakeRun) -> None:
    raw, warm = make_run(), make_run(start="warm")
    errors: list[float] = []
    for run in (raw, warm):
        batch, question = first_question(run)
        wanted = through_the_bridge(run, batch, question)
        answer = ask_raw(run, batch, question).detach()
        errors.append(float((answer - wanted).square().mean()))
    assert errors[1] < 0.95 * errors[0]  # the tiny model is random: there is little to refit


def test_the_warm_start_refits_the_embedding_of_noise_levels() -> None:
    with open_checkpoint(EMBEDDED) as source:
        model = build_model(source)
    levels = Flow(shift=2.5).even_times(300)

    def embedded(times: Tensor) -> Tensor:
        return model.unet.time_embedding(model.unet.time_proj(times))

    wanted, unfitted = embedded(Bridge().timestep(levels)), embedded(1000 * levels)
    warm = WarmStart()
    warm.put(model, refit_time(model, Bridge(), Flow(shift=2.5).even_times(4096)))
    found = embedded(1000 * levels)
    assert (found - wanted).norm() < 0.05 * wanted.norm() < 0.2 * (unfitted - wanted).norm()


def test_the_tensors_of_the_base_are_back_afterwards(make_run: MakeRun) -> None:
    run = make_run(start="warm")
    conversion = run.asking.conversion
    assert conversion is not None
    with open_checkpoint(run.recipe.model.checkpoint) as base:
        stored = {name: base.load(name).float() for name in parameters(run.prepared.model)}
    warm = {name: tensor.clone() for name, tensor in parameters(run.prepared.model).items()}
    with conversion.as_it_was(run.injection):
        inside = {name: tensor.clone() for name, tensor in parameters(run.prepared.model).items()}
    after = parameters(run.prepared.model)
    assert all(torch.equal(inside[name], tensor) for name, tensor in stored.items())
    assert all(torch.equal(after[name], tensor) for name, tensor in warm.items())
    assert sum(not torch.equal(warm[name], stored[name]) for name in stored) == 7  # conv_in keeps its bias


def test_the_rebuilt_model_is_the_trained_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = converting(make_recipe, {"start": "warm", "teacher": "eps"})
    report = train(recipe)
    tuned = tmp_path / "out" / "t.safetensors"
    assert tuned in report.files
    with open_checkpoint(recipe.model.checkpoint) as base:
        catalogue = build_catalogue(base, all_layers=True)
    with open_adapter(tuned, catalogue, replaced=True) as adapter:
        assert isinstance(adapter, TunedAdapter)
        assert len(adapter.replaced) == 8
    rebuilt = tmp_path / "rebuilt.safetensors"
    rebuild(recipe.model.checkpoint, tuned, rebuilt, dtype=torch.float32)
    run = assemble(recipe, Accelerator(cpu=True), Callbacks(), state.saved_states(tmp_path / "out", "t")[-1])
    batch, question = first_question(run)
    run.denoiser.eval()
    with open_checkpoint(rebuilt) as source:
        model = build_model(source)
        assert model.prediction.name == "flow"
    text = run.denoiser.text_states(batch.captions)
    found = model.denoise(question.noised, question.timestep, text, batch.time_ids)
    assert torch.allclose(found, ask_raw(run, batch, question), atol=2e-3)  # other layers stay in fp16


class Losses(Callbacks):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_step(self, info: StepInfo) -> None:
        self.found.append(info.loss)


def test_a_stopped_conversion_goes_on_as_if_it_had_not(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole, rest = Losses(), Losses()
    objective = {"start": "warm", "teacher": "eps"}
    train(
        converting(make_recipe, objective, run={"output": tmp_path / "whole", "steps": 4}), callbacks=[whole]
    )
    parts = {"output": tmp_path / "parts", "steps": 2}
    train(converting(make_recipe, objective, run=parts))
    train(converting(make_recipe, objective, run={**parts, "steps": 4}), callbacks=[rest])
    assert rest.found == whole.found[2:]
    files = [(tmp_path / folder / "t.safetensors").read_bytes() for folder in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_gradient_frame_follows_the_warm_start(make_recipe: MakeRecipe, picture_folder: Path) -> None:
    recipe = converting(
        make_recipe,
        {"start": "warm", "teacher": "eps"},
        model={"frame": "gradient", "frame_batches": 1},
        data={"validation_folder": picture_folder / "held_out"},
    )
    run = assemble(recipe, Accelerator(cpu=True), Callbacks(), None)
    before = held_out_loss(run.denoiser, run.held_out, run.prediction, times=4, batch=2)
    assert train(recipe).validation_before == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"kind": "eps", "flow_shift": ..., "teacher": "eps"}, '`teacher` needs `kind = "flow"`'),
        ({"start": "warm", "bridge_steps": 5}, "give only one of them"),
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
