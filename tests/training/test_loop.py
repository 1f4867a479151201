"""Complete runs on the tiny SDXL."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from functools import partial
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from spectune.adapters.adapter import TunedAdapter
from spectune.adapters.reader import open_adapter
from spectune.checkpoints.open import open_checkpoint
from spectune.errors import InputError, SpectuneError
from spectune.files.provenance import Role
from spectune.files.writer import write_tensors
from spectune.model.offload import StagedModel
from spectune.sdxl.layers import build_catalogue
from spectune.training import base_file, state, trainable_model
from spectune.training.callbacks import Callbacks, StepInfo
from spectune.training.callbacks.console import ConsoleProgress
from spectune.training.loop import train
from spectune.training.objective import objective
from spectune.training.recipe.defaults import with_defaults
from spectune.training.recipe.recipe import Recipe
from tests.training.conftest import MakeRecipe

GUIDE = {"betas": [0.8, 0.8], "schedulefree_c": 10, "d0": 1e-3, "use_stableadamw": False, "d_limiter": False}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 2},
    "prodigy_plus": {"name": "prodigy_plus_schedule_free", "learning_rate": ..., "options": GUIDE},
}


class Losses(Callbacks):
    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}
        self.validation: dict[int, float] = {}

    def on_step(self, info: StepInfo) -> None:
        self.by_step[info.step] = info.loss

    def on_validation(self, step: int, loss: float) -> None:
        self.validation[step] = loss


class StopAt(Callbacks):
    """A callback that sends this process a signal after a step, like Ctrl-C or a scheduler."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step(self, info: StepInfo) -> None:
        if info.step == self.step:
            signal.raise_signal(self.number)


def same_tensors(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


INTERRUPTED: dict[str, tuple[signal.Signals, dict[str, dict[str, Any]]]] = {
    "adamw": (signal.SIGINT, {"optimizer": OPTIMIZERS["adamw"]}),
    "prodigy_plus": (signal.SIGTERM, {"optimizer": OPTIMIZERS["prodigy_plus"]}),
    "bf16": (
        signal.SIGINT,
        {"optimizer": OPTIMIZERS["prodigy_plus"], "run": {"trained_precision": "bf16"}},
    ),
    "ema, edm2 and dropout": (
        signal.SIGINT,
        {
            "optimizer": OPTIMIZERS["adamw"],
            "loss": {"weighting": "edm2"},
            "model": {"dropout_probability": 0.2},
            "run": {"ema_decay": 0.9},
        },
    ),
    "workers": (
        signal.SIGTERM,
        {"optimizer": OPTIMIZERS["adamw"], "data": {"workers": 2, "color_probability": 0.5, "mask": "alpha"}},
    ),
    "cached variants": (
        signal.SIGINT,
        {"optimizer": OPTIMIZERS["adamw"], "data": {"cache_variants": 2, "cache_latents": True}},
    ),
}


SLOW = ("adamw", "prodigy_plus", "bf16", "cached variants")  # other cases have these optimizers too


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in INTERRUPTED]
)
def test_an_interrupted_run_continues_bit_for_bit(make_recipe: MakeRecipe, tmp_path: Path, case: str) -> None:
    signal_number, overrides = INTERRUPTED[case]
    data = {
        "random_crop": True,
        "flip_probability": 0.5,
        "caption": {"shuffle": True, "dropout_probability": 0.3, "tag_dropout_probability": 0.2},
    }
    sections = {**overrides, "data": data | overrides.get("data", {})}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = {"steps": 5, "accumulation": 2, **overrides.get("run", {})}
    last = Random(case).randint(1, 4)
    losses, resumed = Losses(), Losses()

    def recipe(**keys: Any) -> Recipe:
        return make_recipe(**(sections | {"run": run | keys}))

    train(recipe(output=whole), callbacks=[losses])
    first = train(recipe(output=parts), callbacks=[StopAt(last, signal_number)])
    # saves and previews must not change the run
    second = train(recipe(output=parts, save_every_steps=2, preview_every_steps=2), callbacks=[resumed])

    assert (first.interrupted, first.steps) == (True, last)
    assert (second.interrupted, second.first_step, second.steps) == (False, last, 5)
    assert resumed.by_step == {step: losses.by_step[step] for step in range(last + 1, 6)}
    assert same_tensors(whole / "t.safetensors", parts / "t.safetensors")
    for file in (state.TRAINED, state.OPTIMIZER, state.EXTRAS):
        assert same_tensors(whole / "t-step00000005.state" / file, parts / "t-step00000005.state" / file)


def test_names_and_provenance_of_the_files(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    report = train(make_recipe(run={"steps": 5, "save_every_steps": 1, "keep_last": 2}))

    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "t-step00000001.safetensors",
        "t-step00000002.safetensors",
        "t-step00000003.safetensors",
        "t-step00000004.safetensors",
        "t-step00000004.state",
        "t-step00000005.state",
        "t.safetensors",
    ]
    assert sorted(path.name for path in report.files) == names
    with open_checkpoint(tiny_checkpoint) as base:
        tuned = open_adapter(tmp_path / "out" / "t.safetensors", build_catalogue(base))
    assert isinstance(tuned, TunedAdapter)
    origin = tuned.provenance
    assert (origin.role, origin.prediction, origin.flow_shift) == (Role.TUNED, "eps", None)
    assert origin.base_name == tiny_checkpoint.name


@pytest.mark.slow
def test_training_lowers_the_loss_on_its_own_images(make_recipe: MakeRecipe, picture_folder: Path) -> None:
    losses = Losses()
    recipe = make_recipe(
        data={"validation_folder": picture_folder, "flip_probability": 0.0},
        optimizer={"learning_rate": 3e-3},
        run={"steps": 30, "batch": 6, "validate_every_steps": 10},
    )
    report = train(recipe, callbacks=[losses])

    assert losses.validation.keys() == {0, 10, 20, 30}
    assert report.validation_before == losses.validation[0]
    assert report.validation_after == losses.validation[30]
    assert losses.validation[30] < 0.95 * losses.validation[0]
    assert "also used for training" in report.warnings[-1]


def test_flow_with_shift_is_recorded(make_recipe: MakeRecipe, tmp_path: Path, picture_folder: Path) -> None:
    recipe = make_recipe(
        objective={"kind": "flow", "flow_shift": 2.5},
        data={"validation_folder": picture_folder / "held_out"},
        run={"steps": 10},
    )
    report = train(recipe)

    with open_checkpoint(tmp_path / "out" / "t.safetensors") as file:
        origin = file.provenance
    assert (origin.prediction, origin.flow_shift) == ("flow", 2.5)
    assert report.validation_before is not None
    assert report.validation_after is not None
    assert report.validation_after < report.validation_before


def test_zero_steps_leave_zero_deltas(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(run={"steps": 0}))

    tensors = load_file(tmp_path / "out" / "t.safetensors")
    deltas = [tensor for name, tensor in tensors.items() if ".delta_" in name]
    assert deltas
    assert all(not tensor.any() for tensor in deltas)


def test_parts_choose_the_layers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train(make_recipe(model={"parts": ["te2"], "layers": ...}, run={"steps": 1}))

    names = load_file(tmp_path / "out" / "t.safetensors")
    assert names
    assert all(name.startswith("lora_te2_") for name in names)


def test_a_text_cache_does_not_change_the_losses(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    losses = []
    for cache in (False, True):
        run_losses = Losses()
        recipe = make_recipe(
            model={"parts": ["unet"]},
            data={"cache_text": cache, "caption": {"dropout_probability": 0.5}},
            run={"output": tmp_path / str(cache)},
        )
        train(recipe, callbacks=[run_losses])
        losses.append(list(run_losses.by_step.values()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_checkpointing_does_not_change_the_losses(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture_folder: Path
) -> None:
    losses, recomputed = [], Counter[str]()
    inner: Any = torch.utils.checkpoint._checkpoint_without_reentrant_generator  # pyright: ignore

    def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
        # diffusers passes a method of a module, transformers a partial whose first argument is a module
        module = function.args[0] if isinstance(function, partial) else function.__self__
        recomputed[type(module).__name__] += 1
        return inner(function, *args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", counted)
    for checkpointing in (False, True):
        run_losses = Losses()
        run = {
            "output": tmp_path / str(checkpointing),
            "gradient_checkpointing": checkpointing,
            "validate_every_steps": 1,
            "preview_every_steps": 1,
        }
        data = {"validation_folder": picture_folder / "held_out"}
        train(make_recipe(run=run, data=data), callbacks=[run_losses])
        losses.append(list(run_losses.by_step.values()))
        if not checkpointing:
            assert not recomputed
    assert recomputed["CLIPEncoderLayer"] == 3 * 4  # steps, layers of both tiny encoders
    assert recomputed["ResnetBlock2D"] >= 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_both_forms_have_the_same_losses(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    losses = []
    for form in ("delta", "residual"):
        run_losses = Losses()
        train(
            make_recipe(model={"form": form}, run={"output": tmp_path / form, "steps": 5}),
            callbacks=[run_losses],
        )
        losses.append(list(run_losses.by_step.values()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_tensorboard_scalars(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Sheets(Callbacks):
        def on_preview(self, step: int, model: StagedModel) -> Image.Image:
            return Image.new("RGB", (8, 4), "red")

    rates = {"learning_rate": 1e-2, "part_learning_rates": {"te1": 1e-3}}
    run = {"tensorboard": True, "preview_every_steps": 2}
    train(make_recipe(run=run, optimizer=rates), callbacks=[Sheets()])

    events = EventAccumulator(str(tmp_path / "out" / "logs" / "t")).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2, 3]
    assert len(events.Scalars("optimizer/grad_norm")) == 3
    for part, rate in (("unet", 1e-2), ("te1", 1e-3), ("te2", 1e-2)):
        assert events.Scalars(f"optimizer/learning_rate_{part}")[0].value == pytest.approx(rate)
    tuned = load_file(tmp_path / "out" / "t.safetensors")
    of_unet = [t for name, t in tuned.items() if name.startswith("lora_unet") and "delta_up" in name]
    norm = float(torch.cat([tensor.flatten() for tensor in of_unet]).norm())
    assert events.Scalars("norm/unet.up")[-1].value == pytest.approx(norm, rel=1e-5)
    assert [image.step for image in events.Images("preview")] == [2]


def test_the_results_of_a_run_are_kept(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def content() -> dict[str, bytes]:
        files = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files}

    train(make_recipe(run={"steps": 1}))
    before = content()
    with pytest.raises(InputError, match=r"already holds 2 results of a run named t, such as t\.safetensors"):
        train(make_recipe(run={"steps": 1, "resume": False}))
    with pytest.raises(InputError, match=r"belongs to another run: run\.batch was 2 and is now 3") as caught:
        train(make_recipe(run={"steps": 2, "batch": 3}))
    assert "run.resume = false" in (caught.value.hint or "")
    with pytest.raises(InputError, match="multiples of 16 pixels"):  # the run that replaces them cannot start
        train(
            make_recipe(data={"resolution_px": 40, "bucket": {"enabled": False}}, run={"resume": False}),
            force=True,
        )
    assert content() == before
    assert train(make_recipe(run={"steps": 1, "resume": False}), force=True).first_step == 0


def test_sizes_that_do_not_fit_the_model_are_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match="training size 40x40: this model needs multiples of 16 pixels"):
        train(make_recipe(data={"resolution_px": 40, "bucket": {"enabled": False}}))


@pytest.mark.parametrize("name", ["t.safetensors", "t-step00000001.safetensors"])
def test_a_base_is_not_replaced_as_a_result(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_checkpoint: Path, name: str
) -> None:
    base = tmp_path / "out" / name
    base.parent.mkdir()
    shutil.copy(tiny_checkpoint, base)
    (tmp_path / "link.safetensors").symlink_to(base)
    for path in (base, tmp_path / "link.safetensors"):
        with pytest.raises(InputError, match=r"model\.base is .*would overwrite it with its result t"):
            train(make_recipe(model={"base": path}), force=True)
    assert base.exists()


def copy_with_metadata(base: Path, target: Path, metadata: dict[str, str], *keys: str) -> Path:
    """Copy a checkpoint and add metadata and tensors named `keys`."""
    with open_checkpoint(base) as source:
        tensors = {name: source.load(name) for name in source.tensors}
        tensors |= {key: torch.zeros(1) for key in keys}
        write_tensors(target, tensors, metadata={**source.metadata, **metadata})
    return target


def test_the_base_declares_its_prediction_type(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    flow = {"spectune.prediction": "flow", "spectune.flow_shift": "2.5"}
    base = copy_with_metadata(tiny_checkpoint, tmp_path / "flow.safetensors", flow)
    report = train(make_recipe(model={"base": base}, run={"steps": 0}))
    with open_checkpoint(tmp_path / "out" / "t.safetensors") as file:
        origin = file.provenance
    assert (origin.prediction, origin.flow_shift) == ("flow", 2.5)
    assert not any("converts" in warning for warning in report.warnings)

    with pytest.raises(InputError, match="use none or edm2 for flow"):
        train(make_recipe(model={"base": base}, loss={"weighting": "min_snr"}, run={"name": "other"}))
    converted = train(
        make_recipe(model={"base": base}, objective={"kind": "v"}, run={"name": "v", "steps": 0})
    )
    assert (
        "flow.safetensors predicts flow, but objective.kind is v: this run converts the model"
        in converted.warnings
    )


def test_the_base_declares_a_zero_terminal_snr(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    base = copy_with_metadata(tiny_checkpoint, tmp_path / "z.safetensors", {}, "v_pred", "ztsnr")
    recipe = with_defaults(make_recipe(model={"base": base}, run={"steps": 1}), "cpu")
    assert (recipe.objective.kind, recipe.objective.zero_terminal_snr) == ("v", True)
    other = with_defaults(make_recipe(model={"base": base}, objective={"zero_terminal_snr": False}), "cpu")
    assert other.objective.zero_terminal_snr is False
    assert train(recipe).steps == 1


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_not_saved(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_grad_norm: float
) -> None:
    noise_at_random = objective.noise_at_random
    calls: list[int] = []

    def broken(*args: Any, **options: Any) -> Any:
        noised = noise_at_random(*args, **options)
        calls.append(1)
        if len(calls) == 2:
            noised.target[0, 0, 0, 0] = torch.inf
        return noised

    monkeypatch.setattr(objective, "noise_at_random", broken)
    recipe = make_recipe(
        optimizer={"max_grad_norm": max_grad_norm}, run={"save_every_steps": 1, "tensorboard": False}
    )
    with pytest.raises(SpectuneError, match=r"the gradient norm of step 2 is \w+; the step was not saved"):
        train(recipe)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "t-step00000001.safetensors",
        "t-step00000001.state",
    ]


def test_deltas_that_are_not_finite_are_not_saved(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Break(Callbacks):
        def on_step(self, info: StepInfo) -> None:
            next(iter(trained.values())).data.fill_(torch.nan)

    trained: dict[str, torch.nn.Parameter] = {}
    named = trainable_model.trained_tensors
    monkeypatch.setattr(
        trainable_model, "trained_tensors", lambda deltas: trained.update(named(deltas)) or trained
    )  # pyright: ignore
    with pytest.raises(SpectuneError, match=r"after step 1, the trained changes of 1 layer are not finite"):
        train(make_recipe(run={"steps": 1}), callbacks=[Break()])
    assert not (tmp_path / "out").exists()  # nor is an empty folder left


def test_a_finished_run_resumes_with_more_steps_and_its_frames(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_recipe(run={"steps": 1}))
    assert (tmp_path / "out" / "t-step00000001.state" / state.FRAMES).is_file()

    def another_rounding(*args: Any) -> Any:
        raise AssertionError("the base was split again")

    monkeypatch.setattr(base_file, "make_frames", another_rounding)
    report = train(make_recipe(run={"steps": 2}))
    assert (report.first_step, report.steps) == (1, 2)


def test_each_part_has_its_own_step_size(make_recipe: MakeRecipe) -> None:
    class Sizes(Callbacks):
        def on_step(self, info: StepInfo) -> None:
            parts.append(set(info.step_size))

    parts: list[set[str]] = []
    train(make_recipe(optimizer=OPTIMIZERS["prodigy_plus"], run={"steps": 1}), callbacks=[Sizes()])
    assert parts == [{"unet", "te1", "te2"}]


def test_encoding_reports_its_progress(make_recipe: MakeRecipe) -> None:
    class Progress(Callbacks):
        def on_progress(self, stage: str, done: int, total: int) -> None:
            progress.append((stage, done, total))

    progress: list[tuple[str, int, int]] = []
    console = ConsoleProgress(Console(file=StringIO()))
    train(make_recipe(data={"flip_probability": 0.5}, run={"steps": 0}), callbacks=[Progress(), console])
    assert progress[0] == ("encoding images", 0, 1)
    assert progress[1:12] == [("encoding images", done, 12) for done in range(1, 12)]


@pytest.mark.slow
def test_a_configured_autocast_of_accelerate_changes_nothing(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Losses()
    train(make_recipe(run={"steps": 1, "output": tmp_path / "a"}), callbacks=[plain])
    for precision in ("bf16", "fp16"):
        configured, folder = Losses(), tmp_path / precision
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        train(make_recipe(run={"steps": 1, "output": folder}), callbacks=[configured])
        assert configured.by_step == plain.by_step
        assert same_tensors(tmp_path / "a" / "t.safetensors", folder / "t.safetensors")
