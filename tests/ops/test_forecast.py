"""`spectune train --dry-run`: a readable plan, JSON for machines, and problems before the run."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from spectune.cli.app import run
from spectune.cli.reports.starting import dry_run
from spectune.ops.forecast import Space, TrainForecast, setup_of
from spectune.ops.options.training import TrainOptions
from spectune.ops.train import plan_train
from spectune.training.data.cache import caches
from spectune.training.recipe.defaults import with_defaults
from spectune.training.recipe.file import load_recipe


@pytest.fixture(scope="module")
def recipe(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe for five pictures, drawn twice, of which one is damaged."""
    parent = tmp_path_factory.mktemp("forecast")
    folder = parent / "pictures" / "2_shape"
    folder.mkdir(parents=True)
    for index in range(5):
        Image.new("RGB", (40 + 20 * index, 40), (index * 20, 30, 40)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"shape {index}")
    (folder / "broken.png").write_bytes(b"not a picture")
    path = parent / "r.toml"
    path.write_text(
        f"[model]\nbase = {json.dumps(str(tiny_checkpoint))}\nrank = 2\nparts = ['te2']\n"
        "[data]\nfolders = ['pictures']\nresolution_px = 32\nvalidation_folder = 'pictures'\n"
        "[run]\nname = 't'\noutput = 'out'\nepochs = 4\n"
        "batch = 2\naccumulation = 2\nsave_every_steps = 3\nvalidate_every_steps = 5\n"
    )
    return path


@pytest.fixture(scope="module")
def planned(recipe: Path) -> TrainForecast:
    return plan_train(TrainOptions(recipe))


def test_the_plan_counts_everything_and_writes_nothing(
    recipe: Path, planned: TrainForecast, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(recipe.parent.rglob("*"))
    dry_run.show(planned)
    output = capfd.readouterr()
    shown = " ".join(output.err.split())
    assert "5 per epoch, 10 draws; 5 for validation" in shown
    assert "10 of 4 pictures; 2.5 per epoch, 4.0 epochs" in shown
    assert "3 saves, 0 previews, 4 validations" in shown
    assert "broken.png is not an image" in shown
    values = tomllib.loads(output.out)
    assert "null" not in output.out
    assert values["run"]["precision"] == "fp32"
    assert "seed" not in values["run"]

    assert run(["train", str(recipe), "--dry-run", "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert sorted(recipe.parent.rglob("*")) == before
    assert data["schedule"]["steps"] == 10
    assert data["recipe"]["run"]["seed"] == 1
    assert data["pictures"]["sizes"] == {"32x32": 2, "48x16": 3}
    assert data["problems"] == []
    assert data["saves"].startswith("4 adapters of ")


def test_a_save_at_the_last_step_is_the_final_one(recipe: Path) -> None:
    forecast = plan_train(TrainOptions(recipe, overrides=("run.save_every_steps=5",)))
    assert forecast.schedule.saves == 1
    assert forecast.saves.startswith("2 adapters of ")


def test_the_memory_is_that_of_the_captions(recipe: Path) -> None:
    longest = load_recipe(recipe, ("data.caption.max_tokens=150",))
    assert setup_of(with_defaults(longest, "cpu"), 2).max_tokens == 150


def test_too_little_memory_or_disk_is_a_problem(
    planned: TrainForecast, capfd: pytest.CaptureFixture[str]
) -> None:
    full = replace(planned, memory=Space(9_000_000_000, 8_000_000_000), disk=Space(2_000_000_000, 1_000_000))
    assert dry_run.exit_code(planned) == 0
    assert dry_run.exit_code(full) == 1
    dry_run.show(full)
    shown = " ".join(capfd.readouterr().err.split())
    assert "not enough memory: the run needs about 9.00 GB, and" in shown
    assert "not enough disk space: the run needs about 2.00 GB, and the disk of run.output" in shown


def test_latents_on_disk_are_planned(
    planned: TrainForecast, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned.latents == "0.0 MB in the main memory of each process"
    monkeypatch.setattr(caches, "MOST_LATENT_BYTES", 0)
    above = plan_train(TrainOptions(recipe=recipe))
    folder = planned.recipe.run.output / "t.latents"
    assert above.latents == f"0.0 MB in {folder}"
    written = above.disk.required - planned.disk.required
    sides = [(int(side) // 4 for side in size.split("x")) for size in planned.pictures.sizes]  # in latents
    counts = planned.pictures.sizes.values()
    assert written == sum(4 * 4 * w * h * count for (w, h), count in zip(sides, counts, strict=True))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("data.bucket.step_px=24", "this model needs multiples of"),
        ("model.base=gone.safetensors", "gone.safetensors"),
        ("vae.path=gone.safetensors", "gone.safetensors"),
        ("data.validation_folder=gone", "gone is not a folder"),
        ("run.device=cuda:7", "no device cuda:7"),
    ],
)
def test_a_wrong_file_or_value_is_found(
    recipe: Path, capfd: pytest.CaptureFixture[str], change: str, problem: str
) -> None:
    assert run(["train", str(recipe), "--dry-run", "--set", change]) == 2
    assert problem in " ".join(capfd.readouterr().err.split())
