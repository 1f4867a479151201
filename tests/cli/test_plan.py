"""Test `spectune plan` on a tiny SDXL: tables on stderr, a recipe on stdout, exit code 2 if nothing fits."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from spectune.cli.app import run
from spectune.errors import InputError
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.recipe.recipe import parse_recipe

SMALL = ["--rank", "4", "--resolution", "64", "--parts", "te2"]


@pytest.mark.slow
def test_the_recipe_is_on_stdout_and_the_tables_are_on_stderr(
    tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", str(tiny_checkpoint), "--vram", "2GB", *SMALL]) == 0
    output = capfd.readouterr()
    data = tomllib.loads(output.out)
    assert data["model"] == {
        "base": str(tiny_checkpoint),
        "rank": 4,
        "form": "delta",
        "parts": ["te2"],
        "quantize": "none",
    }
    data["data"]["folders"] = ["pictures"]
    data["run"] |= {"name": "t", "output": "out", "steps": 1}
    recipe = parse_recipe(data)
    assert (recipe.data.resolution_px, recipe.run.precision, recipe.run.batch) == (64, "bf16", 1)
    shown = " ".join(output.err.split())
    assert "best that fits" in shown
    assert "they were not measured on a GPU" in shown
    assert "the reserve is 600.0 MB for CUDA and 5%" in shown
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.err.splitlines()]
    notes = {row[0]: row[1] for row in rows if len(row) == 3}
    assert notes["encoding images, float32"].startswith("before training")
    assert notes["encoding images, bfloat16"] == notes["decoding previews, bfloat16"] == "not needed"
    assert notes["sampling previews"] == "between two steps"
    assert notes["required"].startswith("by ")
    assert "limited by" in shown


@pytest.mark.slow
def test_less_memory_gives_cheaper_settings(tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(tiny_checkpoint), "--rank", "4", "--resolution", "64", "--json"]
    assert run([*command, "--vram", "2GB"]) == 0
    wide = json.loads(capfd.readouterr().out)
    memory, first, second = wide["best"]["memory"], wide["best"], wide["runners_up"][0]
    assert first["setup"]["parts"] == ["unet", "te1", "te2"]
    assert not first["setup"]["gradient_checkpointing"]
    assert second["setup"]["gradient_checkpointing"]
    assert memory["total"] == memory["reserve"] + memory["peak"]
    assert memory["optimizer"] == wide["optimizers"]["adamw"]
    assert set(wide["optimizers"]) == set(OPTIMIZERS)
    unet = wide["weights"]["UNet"]
    assert unet["fp32"] == 2 * unet["bf16"] > 2 * unet["int8"] > 2 * unet["nf4"]

    assert run([*command, "--vram", str(memory["total"] - 1)]) == 0
    narrow = json.loads(capfd.readouterr().out)
    assert narrow["best"] == second
    assert [one["least"] for one in narrow["too_large"]] == [memory["total"]]
    assert "gradient_checkpointing = true" in narrow["recipe"]


def test_exit_code_2_if_nothing_fits(tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(tiny_checkpoint), "--vram", "100MB", *SMALL]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    shown = " ".join(output.err.split())
    assert "nothing fits 0.10 GB: the smallest setup, rank 4, te2, residual, nf4 base, checkpointing" in shown
    assert "takes 0.6" in shown
    assert "at 64 px with batch 1" in shown
    assert "hint: use a smaller --resolution or --batch" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vram", "12XB"], "unknown unit 'XB' in '12XB'"),
        (["--vram", "1GB", "--parts", "te3"], "unknown part 'te3' in --parts; did you mean"),
        (["--vram", "1GB", "--optimizer", "adamww"], "unknown optimizer 'adamww'; did you mean `adamw`?"),
        (
            ["--vram", "1GB", "--resolution", "50"],
            "--resolution is 50: this model needs a multiple of 16 pixels",
        ),
    ],
)
def test_wrong_options(
    tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(["plan", str(tiny_checkpoint), *words]) == 2
    assert message in " ".join(capfd.readouterr().err.split())


def test_residuals_and_adapters_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["split", str(tiny_checkpoint), "-o", str(tmp_path), "--rank", "2"]) == 0
    for file, message in (
        ("residual", "is a residual: expected"),
        ("principal-r2", "is an adapter: expected"),
    ):
        path = tmp_path / f"{tiny_checkpoint.stem}.{file}.safetensors"
        assert run(["plan", str(path), "--vram", "1GB"]) == 2
        assert message in " ".join(capfd.readouterr().err.split())


def test_help_has_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--help"]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "Example: spectune plan model.safetensors --vram 12GB" in shown


def test_the_size_may_be_a_bare_number_or_that_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectune.model import device
    from spectune.ops import plan as module

    assert [module._vram(size) for size in ("12", " 8.5 ", "12GB", "12GiB", 10)] == [
        12 * 10**9,
        85 * 10**8,
        12 * 10**9,
        12 * 2**30,
        10,
    ]
    monkeypatch.setattr(device, "total_memory", lambda: 8 * 2**30)
    assert module._vram(None) == 8 * 10**9
    monkeypatch.setattr(device, "total_memory", lambda: None)
    with pytest.raises(InputError, match="`vram` is missing: this machine has no CUDA card"):
        module._vram(None)
