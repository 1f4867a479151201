"""Models by name: the configuration file, ambiguous names, and names that leave the folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spectune.cli.app import run
from spectune.errors import InputError
from spectune.files.model_folders import config
from spectune.files.model_folders.config import read_model_folders
from spectune.files.model_folders.search import find_model
from spectune.ops.doctor import machine
from spectune.ops.drawing.specs import parse_model
from spectune.ops.options.training import PlanOptions
from spectune.ops.options.values import parse_slice


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the configuration file of a user with two programs."""
    for name in (
        "comfy/models/checkpoints/sdxl/Pony.safetensors",
        "comfy/models/checkpoints/base.safetensors",
        "comfy/models/checkpoints/parts.safetensors.index.json",
        "comfy/models/checkpoints/parts-00001-of-00002.safetensors",
        "comfy/models/vae/base.safetensors",
        "forge/base.safetensors",
        "forge/pipeline/model_index.json",
        "forge/pipeline/unet/weights.safetensors",
        "outside.safetensors",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path = tmp_path / "config.toml"
    path.write_text(f"model_folders = {json.dumps([str(tmp_path / 'comfy'), 'forge'])}\n")
    monkeypatch.setattr(config, "config_path", lambda: path)
    monkeypatch.setattr("spectune.files.model_folders.search.config_path", lambda: path)
    return path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("pony", "comfy/models/checkpoints/sdxl/Pony.safetensors"),
        ("Pony.safetensors", "comfy/models/checkpoints/sdxl/Pony.safetensors"),
        ("sdxl/pony", "comfy/models/checkpoints/sdxl/Pony.safetensors"),
        (r"sdxl\pony.safetensors", "comfy/models/checkpoints/sdxl/Pony.safetensors"),
        ("parts", "comfy/models/checkpoints/parts.safetensors.index.json"),
        ("pipeline", "forge/pipeline"),
    ],
)
def test_a_name_finds_its_model(settings: Path, name: str, found: str) -> None:
    assert find_model(Path(name)) == settings.parent / found
    assert PlanOptions(model=name).model == settings.parent / found  # pyright: ignore[reportArgumentType]


def test_models_in_words_are_found_too(settings: Path) -> None:
    pony = settings.parent / "comfy/models/checkpoints/sdxl/Pony.safetensors"
    assert parse_model("Pony.safetensors+style.safetensors:0.8").model == pony
    assert parse_slice("pony.safetensors:te").path == pony


def test_an_ambiguous_name_lists_the_matches(settings: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "base"]) == 2
    error = " ".join(capfd.readouterr().err.split())
    assert "base is the name of 2 models: " in error
    assert str(Path("comfy/models/checkpoints/base.safetensors")) in error
    assert str(Path("forge/base.safetensors")) in error


@pytest.mark.parametrize("name", ["../outside", "sdxl/../../../../outside.safetensors", "weights", "outside"])
def test_a_name_never_leaves_the_folders(settings: Path, name: str) -> None:
    if ".." in name:
        assert find_model(Path(name)) == Path(name)  # unchanged: opening it says that it does not exist
    else:
        with pytest.raises(InputError, match="does not exist"):
            find_model(Path(name))


def test_an_unknown_name_is_compared_with_the_known_ones(settings: Path) -> None:
    with pytest.raises(InputError, match=r"2 model folders.*did you mean `pony`"):
        find_model(Path("ponny"))


def test_an_existing_path_needs_no_configuration(settings: Path) -> None:
    settings.write_text("broken [")
    existing = settings.parent / "outside.safetensors"
    assert find_model(existing) == existing
    with pytest.raises(InputError, match=r"config.toml cannot be read: .*"):
        find_model(Path("pony"))


def test_without_a_configuration_file_nothing_is_searched(settings: Path) -> None:
    settings.unlink()
    assert find_model(Path("pony")) == Path("pony")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model_folder = []", "unknown key `model_folder`; did you mean `model_folders`"),
        ('model_folders = "D:/ComfyUI"', "`model_folders` must be a list of folders"),
        ("model_folders = [1]", "`model_folders` must be a list of folders"),
    ],
)
def test_a_wrong_configuration_file_is_an_error(settings: Path, text: str, problem: str) -> None:
    settings.write_text(text)
    with pytest.raises(InputError) as caught:
        read_model_folders()
    assert problem in caught.value.what


def test_the_doctor_warns_about_folders_that_are_missing(
    settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "config_path", lambda: settings)
    assert machine.wrong_model_folders() == ""
    settings.write_text('model_folders = ["gone", "forge"]')
    assert re.search(r"config.toml lists folders that do not exist: .*gone;", machine.wrong_model_folders())
    settings.write_text("model_folders")
    assert "config.toml cannot be read" in machine.wrong_model_folders()


def test_the_extra_paths_of_comfyui_are_read(settings: Path) -> None:
    (settings.parent / "comfy/extra_model_paths.yaml").write_text(
        "a111:\n  base_path: ../forge\n  checkpoints: .\n  loras: |\n    models/Lora\n"
        "other:\n  checkpoints: |\n    ../gone\n    ../forge\n"
    )
    folders = read_model_folders()
    assert [folder.resolve().name for folder in folders.present] == ["checkpoints", "forge"]
    assert [folder.name for folder in folders.missing] == ["gone"]
