"""`spectune new`: a commented recipe that trains, what is inferred, asked and assumed."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectune.cli.app import run
from spectune.cli.reports.starting import new as report
from spectune.errors import InputError
from spectune.ops.new import choices, name_of, new
from spectune.ops.new.choices import steps_for
from spectune.ops.new.prompts import prompts_of
from spectune.training.recipe.file import load_recipe


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a flat folder with three pictures; one has no caption. Beside it is a validation folder."""
    for index, name in enumerate(["my style/a", "my style/b", "my style/c", "validation/v"]):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (90, 70), (index * 20, 30, 40)).save(path)
        if not name.endswith("c"):
            path.with_suffix(".txt").write_text(f"shape {index}")
    return tmp_path / "my style"


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny-vpred.safetensors"
    shutil.copy(tiny_checkpoint, path)
    return path


def test_a_recipe_is_written_from_a_model_and_a_folder(
    model: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["new", model.name, "my style", "--yes"]) == 0
    output = capfd.readouterr()
    assert output.out == "spectune train my_style.toml --dry-run\nspectune train my_style.toml\n"
    shown = " ".join(output.err.split())
    assert "does not declare its prediction type: v is assumed; pass --prediction" in shown
    assert "1 caption empty: c.png" in shown
    text = (tmp_path / "my_style.toml").read_text()
    data = tomllib.loads(text)
    assert data["model"] == {"base": "tiny-vpred.safetensors", "rank": 16}
    assert data["data"]["sets"] == [{"path": "my style"}]
    assert data["data"]["validation_folder"] == "validation"
    assert data["data"]["resolution_px"] == 64
    assert data["objective"] == {"kind": "v"}
    assert (data["run"]["steps"], data["run"]["batch"], data["run"]["save_every_steps"]) == (170, 3, 40)
    recipe = load_recipe(tmp_path / "my_style.toml")
    assert recipe.run.preview == tmp_path / "my_style.prompts.txt"
    assert (tmp_path / "my_style.prompts.txt").read_text().splitlines()[2:] == [
        "shape 0 --d 1",
        "shape 1 --d 2",
    ]
    assert recipe.run.output == tmp_path / "runs/my_style"
    values = [line for line in text.splitlines() if " = " in line and not line.startswith(("#", "path"))]
    assert all(" # " in line for line in values), "a value has no comment"
    assert text.splitlines()[0] == "# spectune train my_style.toml"


def test_a_recipe_is_never_overwritten(model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.toml"
    out.write_text("mine")
    with pytest.raises(InputError, match=r"r.toml exists"):
        new(model, pictures, out=out, yes=True)
    assert out.read_text() == "mine"
    assert new(model, pictures, out=out, yes=True, force=True).path == out


def test_prompts_are_captions_that_a_line_can_hold() -> None:
    captions = ["", "# tag", "a --w 9", "a\u2028b", *(f"shape {index}" for index in range(8)), "shape 0"]
    assert prompts_of(captions) == ["shape 0", "shape 2", "shape 4", "shape 6"]


def test_only_what_the_files_do_not_show_is_asked(model: Path, pictures: Path, tmp_path: Path) -> None:
    asked: list[tuple[str, Sequence[str]]] = []

    def reply(question: str, default: str, replies: Sequence[str]) -> str:
        asked.append((default, replies))
        return "eps" if replies else "a shape"

    made = new(model, pictures, out=tmp_path / "r.toml", ask=reply)  # pyright: ignore[reportCallIssue]
    assert asked == [("v", ("eps", "v", "flow")), ("", ())]
    data = tomllib.loads(made.text)
    assert data["objective"]["kind"] == "eps"
    assert data["data"]["sets"] == [{"path": "my style", "caption": "a shape"}]
    assert made.warnings == ()
    asked.clear()
    new(model, pictures, out=tmp_path / "s.toml", prediction="v", yes=True, ask=reply)  # pyright: ignore[reportCallIssue]
    assert asked == []


def test_n_name_folders_are_listed_by_their_parent(model: Path, pictures: Path, tmp_path: Path) -> None:
    parent = tmp_path / "data"
    shutil.copytree(pictures, parent / "5_shape")
    made = new(model, parent, out=tmp_path / "r.toml", yes=True, steps=12, prediction="eps", name="x")
    data = tomllib.loads(made.text)
    assert data["data"]["folders"] == ["data"]
    assert "validation_folder" in data["data"]
    assert (data["run"]["steps"], data["run"]["save_every_steps"], data["run"]["name"]) == (12, 3, "x")


@pytest.mark.parametrize(
    ("pictures", "batch", "steps"), [(1, 1, 500), (10, 1, 1000), (30, 1, 3000), (120, 1, 6000), (120, 8, 750)]
)
def test_steps_follow_the_rule_of_thumb(pictures: int, batch: int, steps: int) -> None:
    assert steps_for(pictures, batch) == steps


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("10_my style", "my_style"),
        ("mystyle/images", "mystyle"),
        ("mystyle/data/images", "mystyle"),
        ("a.b", "a.b"),
        ("写真", "写真"),
        ("...!", "style"),
    ],
)
def test_the_run_has_the_name_of_the_folder(tmp_path: Path, folder: str, name: str) -> None:
    assert name_of(tmp_path / folder) == name


@pytest.mark.slow
@pytest.mark.parametrize(("vram", "batch"), [("2GB", 4), ("0.85GB", 2)])
def test_the_settings_are_planned_for_the_card(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vram: str, batch: int
) -> None:
    monkeypatch.setattr(choices, "is_full_size", lambda layout: True)
    made = new(model, pictures, out=tmp_path / "r.toml", rank=4, prediction="eps", vram=vram, yes=True)
    data = tomllib.loads(made.text)
    assert data["run"]["batch"] == batch
    assert f"planned for {float(vram[:-2]):.1f} GB: rank 4" in " ".join(made.notes)


def test_the_terminal_asks_until_a_choice_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = iter(["vpred", "v"])
    monkeypatch.setattr(report.typer, "prompt", lambda *_, **__: next(replies))
    assert report.ask("type", "eps", ("eps", "v")) == "v"


@pytest.mark.parametrize(
    ("folder", "problem"),
    [("gone", "`folder` .*gone is not a folder"), ("empty", "no usable image in .*empty")],
)
def test_a_folder_without_pictures_is_an_error(
    model: Path, tmp_path: Path, folder: str, problem: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=problem):
        new(model, tmp_path / folder, out=tmp_path / "r.toml", yes=True)
    assert not (tmp_path / "r.toml").exists()


def test_a_caption_for_all_hides_no_other_warning(model: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "broken.png").write_bytes(b"not a picture")

    def ask(question: str, default: str, choices: Sequence[str]) -> str:
        return "a shape" if "caption" in question else default

    report = new(model, pictures, out=tmp_path / "r.toml", ask=ask)
    assert any("broken.png" in warning for warning in report.warnings)
    assert not any("caption empty" in warning for warning in report.warnings)


def test_a_model_that_cannot_be_trained_gets_no_recipe(model: Path, pictures: Path, tmp_path: Path) -> None:
    tensors = load_file(model) | {"edm_mean": torch.zeros(1)}
    with safe_open(model, "pt") as file:
        save_file(tensors, tmp_path / "edm.safetensors", metadata=file.metadata())
    with pytest.raises(InputError, match="is an EDM model"):
        new(tmp_path / "edm.safetensors", pictures, out=tmp_path / "r.toml", yes=True)
    assert not (tmp_path / "r.toml").exists()
