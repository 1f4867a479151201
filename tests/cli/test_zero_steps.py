"""Test that training for zero steps changes neither the rebuilt file nor its pictures."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from spectune.cli.app import run

RECIPE = """
[model]
base = "base.safetensors"
principal = "base.principal-r4.safetensors"
form = "delta"

[data]
folders = ["images"]
resolution_px = 32

[run]
name = "nothing"
output = "."
steps = 0
batch = 2
tensorboard = false
"""


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint, tmp_path / "base.safetensors")
    images = tmp_path / "images" / "2_dots"
    images.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (32, 32), (60 * number, 10, 10)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"dot {number}", encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    assert run(["split", str(tmp_path / "base.safetensors"), "-o", str(tmp_path), "--rank", "4"]) == 0
    return tmp_path


def same_bits(first, second):
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(
        torch.equal(one[name].reshape(-1).view(torch.uint8), two[name].reshape(-1).view(torch.uint8))
        for name in one
    )


def test_zero_steps_rebuild_the_original(folder):
    base, rebuilt = folder / "base.safetensors", folder / "rebuilt.safetensors"
    assert run(["train", str(folder / "recipe.toml")]) == 0
    assert run(["rebuild", str(folder / "nothing.safetensors"), "--base", str(base), "-o", str(rebuilt)]) == 0
    assert same_bits(base, rebuilt)
    small = ["-c", "a cat", "--size", "32", "--steps", "2"]
    assert run(["sample", str(base), *small, "-o", str(folder / "a")]) == 0
    assert (
        run(["sample", str(base), str(folder / "nothing.safetensors"), *small, "-o", str(folder / "b")]) == 0
    )
    assert (folder / "a" / "000-a-cat.png").read_bytes() == (folder / "b" / "000-a-cat.png").read_bytes()


def test_one_step_changes_the_model(folder):
    base, rebuilt = folder / "base.safetensors", folder / "rebuilt.safetensors"
    assert run(["train", str(folder / "recipe.toml"), "--set", "run.steps=1"]) == 0
    assert run(["rebuild", str(folder / "nothing.safetensors"), "--base", str(base), "-o", str(rebuilt)]) == 0
    assert not same_bits(base, rebuilt)


@pytest.mark.slow
def test_previews_are_drawn_on_request(folder):
    recipe = str(folder / "recipe.toml")
    assert run(["train", recipe, "--set", "run.steps=2", "--set", "run.preview_every_steps=2"]) == 0
    with Image.open(folder / "previews" / "nothing-step00000002.png") as sheet:
        assert sheet.width > 3 * 32


def test_previews_of_prompts(folder):
    (folder / "prompts.txt").write_text("a cat --s 2\na dog --w 64 --s 2 --l 1 --ss pndm\n", encoding="utf-8")
    preview = [f"run.preview={(folder / 'prompts.txt').as_posix()}", "run.preview_at_start=true"]
    sets = [word for override in ["run.steps=1", *preview] for word in ("--set", override)]
    assert run(["train", str(folder / "recipe.toml"), *sets]) == 0
    # the start, and the end, because no interval is set
    names = ["nothing-step00000000", "nothing-step00000001"]
    assert sorted(path.stem for path in (folder / "previews").glob("*.png")) == names
    with Image.open(folder / "previews" / names[1] / f"{names[1]}-02.png") as picture:
        assert (picture.size, picture.info["caption"]) == ((64, 32), "a dog")
    (folder / "prompts.txt").write_text("a cat --x\n", encoding="utf-8")
    assert run(["train", str(folder / "recipe.toml"), *sets, "--set", "run.name=other"]) == 2
    assert not list(folder.glob("other*"))
