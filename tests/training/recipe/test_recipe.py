from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spectune.errors import InputError
from spectune.training.recipe.file import load_recipe
from spectune.training.recipe.recipe import parse_recipe

ROOT = Path(__file__).parents[3]
RECIPES = [*sorted((ROOT / "recipes").glob("*.toml")), ROOT / "demo" / "demo.toml"]

MINIMAL = """
[model]
base = "base.safetensors"
rank = 16

[data]
folders = ["images"]

[run]
name = "style"
output = "out"
steps = 10
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "style.toml"
    path.parent.mkdir()
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_parses_and_starts_with_its_command(path: Path) -> None:
    command = path.read_text().splitlines()[0]
    assert command.startswith("# spectune ")
    assert f"spectune train {path.relative_to(ROOT).as_posix()}" in command
    assert load_recipe(path).run.name


def test_defaults(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.model.form == "delta"
    assert recipe.model.parts == ("unet", "te1", "te2")
    assert (recipe.objective.kind, recipe.loss.kind, recipe.loss.weighting) == (None, "mse", "none")
    assert recipe.caches_latents
    assert not recipe.caches_text  # the encoders are trained


def test_paths_are_relative_to_the_recipe_and_overrides_to_the_working_directory(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(recipe_file, ["run.output=elsewhere", 'data.folders=["mine"]'])
    assert recipe.model.base == recipe_file.parent / "base.safetensors"
    assert recipe.run.output == tmp_path / "elsewhere"
    assert recipe.data.folders == (tmp_path / "mine",)
    recipe = load_recipe(recipe_file, ["data.folders=red, round"])
    assert recipe.data.folders == (tmp_path / "red, round",)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.steps=25", "run", "steps", 25),
        ("run.resume=false", "run", "resume", False),
        ("run.name=plain_word", "run", "name", "plain_word"),
        ("run.name='quoted'", "run", "name", "quoted"),
        ("optimizer.learning_rate=3e-4", "optimizer", "learning_rate", 3e-4),
        ('model.parts=["unet"]', "model", "parts", ("unet",)),
        ("model.parts=unet, te2", "model", "parts", ("unet", "te2")),
        ("model.parts=[unet,te2]", "model", "parts", ("unet", "te2")),
        ("run.offload=vae", "run", "offload", ("vae",)),
        ("optimizer.options.weight_decay=0.1", "optimizer", "options", {"weight_decay": 0.1}),
    ],
)
def test_overrides_are_toml_values(
    recipe_file: Path, override: str, section: str, key: str, value: object
) -> None:
    assert getattr(getattr(load_recipe(recipe_file, [override]), section), key) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.rnak=3", "style.toml: [model] unknown key `rnak`; did you mean `rank`?"),
        ("modle.rank=3", "style.toml: unknown key `modle`; did you mean `model`?"),
        ("data.bucket.step=8", "style.toml: [data.bucket] unknown key `step`; did you mean `step_px`?"),
        (
            "optimizer.options.weight_dcay=1",
            "adamw has no option `weight_dcay`; did you mean `weight_decay`?",
        ),
        ("optimizer.options.eps=-1", "option `eps` of adamw: Input should be greater than 0, got -1"),
        ("optimizer.name=adam", "; did you mean `adamw`?"),
        (
            "objective.kind=epsilon",
            "[objective] `kind`: `epsilon` is not one of eps, v, flow; did you mean `eps`?",
        ),
        ("run.batch=0", "[run] `batch`: input should be greater than or equal to 1, got 0"),
        (
            "optimizer.options.betas=[0.9, 1.0]",
            "option `betas` of adamw: Input should be less than 1, got 1.0",
        ),
        ("data.caption.keep_tokens=1", "[data.caption] `keep_tokens` does nothing without `shuffle`"),
        ('data.caption.extensions=["txt"]', "`extensions` must begin with a dot, like `.txt`; got `txt`"),
        ("loss.min_snr_gamma=5", '[loss] `min_snr_gamma` does nothing without `weighting = "min_snr"`'),
        ('model.principal="p"', "[model] set either `principal`"),
        ("model.parts=[]", "[model] `parts` is empty"),
        ("objective={kind='eps', flow_shift=2.5}", '`flow_shift` needs `kind = "flow"`, not "eps"'),
        ("objective={kind='v', flow_times_min=0.1}", '`flow_times_min` needs `kind = "flow"`, not "v"'),
        (
            "objective={kind='flow', flow_times_mean=1}",
            '`flow_times_mean` does nothing without `flow_times = "logit_normal"`',
        ),
        ("objective={kind='flow', flow_times='beta'}", "`flow_times_alpha` or `flow_times_beta`"),
        (
            "objective={kind='flow', flow_times='bta'}",
            "is not one of uniform, logit_normal, beta; did you mean",
        ),
        (
            "objective={kind='flow', flow_times_uniform_share=0.1}",
            '`flow_times_uniform_share` does nothing with `flow_times = "uniform"`',
        ),
        (
            "objective={kind='flow', flow_times_min=0.5, flow_times_max=0.5}",
            "`flow_times_min` is 0.5 and `flow_times_max` 0.5: expected a smaller minimum",
        ),
        (
            "objective={kind='flow', flow_times='logit_normal', flow_times_std=0.01, flow_times_min=0.9}",
            "a share of only 0 of the noise levels is between 0.9 and 1",
        ),
        (
            "data.cache_text=true",
            "data.cache_text needs frozen text encoders, but model.parts trains te1, te2",
        ),
        ("run.name=../x", "[run] `name`"),
        ("run.name.x=3", "override `run.name.x=3`: `name` is a value, not a section"),
        ("run.steps", "override `run.steps` is not of the form section.key=value"),
    ],
)
def test_messages(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_file, [override])
    assert message in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.kind=flow", "loss.weighting=min_snr"], "use none or edm2 for flow"),
        (
            ["objective={kind='flow', flow_pairing='optimal_transport'}", "run.batch=1"],
            "objective.flow_pairing uses several images of a batch, but run.batch is 1: raise run.batch",
        ),
        (
            ["loss.contrastive_weight=0.05", "run.batch=1"],
            "contrastive_weight uses several images of a batch",
        ),
        (
            ["objective.kind=eps", "loss.contrastive_weight=0.05", "run.batch=2"],
            'contrastive_weight needs objective.kind = "flow", not "eps"',
        ),
        (
            ["objective={kind='flow', teacher='eps'}", "loss.contrastive_weight=0.05", "run.batch=2"],
            "contrastive_weight contrasts the velocities of images, but objective.teacher replaces them",
        ),
        (["loss.contrastive_weight=0.05", "loss.weighting=edm2"], "learns their logarithm: set only one"),
        (["loss.contrastive_weight=1"], "`contrastive_weight`: input should be less than 1"),
        (["optimizer.name=prodigy_plus_schedule_free", "optimizer.learning_rate=1e-3"], "set it to 1"),
        (["optimizer.name=prodigy_plus_schedule_free", "optimizer.schedule=cosine"], "is schedule-free"),
        (["run.steps=1", "run.epochs=1"], r"\[run\] set either `steps` or `epochs`"),
        (
            ["data.bucket={enabled=true, min_px=8, max_px=64, step_px=64}", "data.resolution_px=32"],
            "`bucket.step_px` 64 is larger than `resolution_px` 32: no bucket fits",
        ),
        (
            ["optimizer.name=prodigy_plus_schedule_free", "optimizer.options.beta3=-0.1"],
            "option `beta3` of prodigy_plus_schedule_free",
        ),
        (["data.random_crop=true", "data.cache_latents=true"], "`cache_latents` needs fixed crops"),
        (
            ["data.bucket.enabled=true", "data.bucket.max_px=768"],
            "`resolution_px` 1024 must be between `bucket.min_px` and `bucket.max_px`, 512..768",
        ),
        (["model.frame=gradient", "model.form=residual"], '`frame = "gradient"` needs `form = "delta"`'),
        (["model.frame=data", "model.form=residual"], '`frame = "data"` needs `form = "delta"`'),
        (["model.frame=minor", "model.frame_batches=2"], "`frame_batches` does nothing without `frame ="),
        (["model.frame=random"], r"\[model\] `frame`: input should be 'principal', 'minor'"),
        (["model.frame_norm=0"], "`frame_norm`: input should be greater than 0"),
    ],
)
def test_messages_of_keys_that_contradict_each_other(
    recipe_file: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(recipe_file, overrides)


@pytest.mark.parametrize("override", ['frame="plain"', "frame_norm=1.0", 'layers=["all"]'])
def test_frame_keys_need_rank(tmp_path: Path, override: str) -> None:
    path = tmp_path / "principal.toml"
    path.write_text(MINIMAL.replace("rank = 16", 'principal = "p.safetensors"'))
    load_recipe(path)
    with pytest.raises(
        InputError,
        match=r"needs `rank`, because the file in `principal` or `start` already contains its frame",
    ):
        load_recipe(path, [f"model.{override}"])


def test_an_override_of_steps_or_epochs_replaces_the_other(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["run.epochs=2"]).run.epochs == 2
    recipe_file.write_text(MINIMAL.replace("steps = 10", "epochs = 3"))
    run = load_recipe(recipe_file, ["run.steps=500"]).run
    assert (run.steps, run.epochs) == (500, None)


def test_missing_keys_and_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe: key `model` is missing; key `data` is missing"):
        parse_recipe({})
    with pytest.raises(InputError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(InputError, match=r"broken.toml is not valid TOML: .*line 1"):
        load_recipe(broken)


def test_a_recipe_is_frozen(recipe_file: Path) -> None:
    recipe: Any = load_recipe(recipe_file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.run.steps = 3
