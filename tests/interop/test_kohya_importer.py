"""Test that commands of sd-scripts are converted to recipes, with a result for every flag."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from spectune.cli.app import run
from spectune.interop.kohya import importer
from spectune.interop.kohya.command_line import parse_command
from spectune.interop.kohya.importer import replaced_by_split
from spectune.training.recipe.file import load_recipe
from tests.interop.kohya_commands import GUIDE_FIX, GUIDE_TRAINING, SHORT


def test_the_training_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["recipe", "import", GUIDE_TRAINING]) == 0
    output = capfd.readouterr()
    assert output.out == ""
    assert "unknown" not in output.err
    text = Path("recipe.toml").read_text(encoding="utf-8")
    assert text.splitlines()[0] == "# spectune train recipe.toml"
    assert 'base = "original.safetensors"' in text  # the comment on training on the original
    assert tomllib.loads(text) == {
        "model": {
            "residual": "K:/Comfyui_033/ComfyUI/output/checkpoints/BIG25NULLdiff.safetensors",
            "principal": "K:/Comfyui_033/ComfyUI/models/loras/train/ext_big25_fix.safetensors",
            "form": "residual",
        },
        "vae": {"path": "K:/ComfyUI_p022/ComfyUI/models/vae/kohaku"},
        "data": {
            "folders": ["mydataset"],
            "resolution_px": 1024,
            "workers": 1,
            "color_probability": 0.33,
            "flip_probability": 0.5,
            "random_crop": True,
            "bucket": {"enabled": True, "step_px": 64, "min_px": 768, "max_px": 1280},
            "caption": {"shuffle": True, "extensions": [".txt"], "dropout_probability": 0.5},
        },
        "objective": {"kind": "flow", "flow_shift": 2.5},
        "loss": {"kind": "fft"},
        "optimizer": {
            "name": "prodigy_plus_schedule_free",
            "learning_rate": 1.0,
            "options": {
                "prodigy_steps": 100,
                "betas": [0.8, 0.8],
                "schedulefree_c": 10,
                "weight_decay_by_lr": False,
                "d0": 1e-5,
                "use_stableadamw": False,
                "d_limiter": False,
                "d_coef": 1,
                "use_speed": False,
            },
        },
        "run": {
            "output": "output_dir",
            "name": "NAME",
            "epochs": 1000,
            "save_every_steps": 100,
            "batch": 1,
            "accumulation": 1,
            "precision": "bf16",
            "gradient_checkpointing": True,
            "trained_precision": "bf16",
            "seed": 1,
            "tensorboard": True,
        },
    }
    assert load_recipe(Path("recipe.toml")).objective.flow_shift == 2.5


def test_every_flag_of_the_guide_has_one_line(tmp_path: Path, capfd: Any) -> None:
    assert run(["recipe", "import", GUIDE_TRAINING, "-o", str(tmp_path / "r.toml")]) == 0
    lines = capfd.readouterr().err.splitlines()
    flags = re.findall(r"^--(\w+)", GUIDE_TRAINING, flags=re.MULTILINE)
    assert len(flags) == 48
    for flag in flags:
        matches = [line for line in lines if re.match(rf"--{flag}(?!\w)", line)]
        parts = {"network_args": 5, "optimizer_args": 9}.get(flag, 1)
        assert len(matches) == parts, flag
        assert all(": imported as " in line or ": ignored: " in line for line in matches)
    assert any("dropped text after the command: That’s it — the training starts." in line for line in lines)


def test_step_3_of_the_guide_is_replaced_by_a_split_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["recipe", "import", GUIDE_FIX]) == 0
    output = capfd.readouterr()
    assert output.out == (
        "spectune split K:/Comfyui_033/ComfyUI/models/checkpoints/bigaspV25_v25.safetensors "
        "--rank 64 --dtype bfloat16 -o output_dir\n"
    )
    assert "This command trains nothing" in output.err
    assert "The trainer stores the factors in bfloat16. With --dtype bfloat16, the" in output.err
    assert list(tmp_path.iterdir()) == []


def test_step_3_with_another_conv_rank_and_a_path_with_spaces() -> None:
    text = GUIDE_FIX.replace('"conv_dim=64"', "conv_dim=32").replace("K:/Comfyui_033", "K:/my models")
    assert replaced_by_split(parse_command(text)) == (
        'spectune split "K:/my models/ComfyUI/models/checkpoints/bigaspV25_v25.safetensors" '
        "--rank 64 --conv-rank 32 --dtype bfloat16 -o output_dir"
    )


@pytest.mark.parametrize(
    ("flags", "option"),
    [
        ("--full_bf16", " --dtype bfloat16 "),
        ("--full_bf16 --save_precision=float", " --dtype bfloat16 "),
        ("--save_precision=bf16", " --dtype bfloat16 "),
        ("--save_precision=float", " --dtype float32 "),
        ("--save_precision=fp16", " "),
        ("", " "),
    ],
)
def test_the_split_stores_factors_in_the_dtype_of_the_trainer(flags: str, option: str) -> None:
    text = f"{SHORT} --network_weights=p.safetensors --learning_rate=1e-24 {flags}"
    assert replaced_by_split(parse_command(text)) == f"spectune split m.safetensors{option}-o o"


@pytest.mark.parametrize(
    "change", [("0.000000000000000000000001", "1e-6"), ("--network_weights=", "--base_weights=")]
)
def test_a_command_that_trains_is_not_replaced(change: tuple[str, str]) -> None:
    assert replaced_by_split(parse_command(GUIDE_FIX.replace(*change))) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "no training command: found neither a script such as sdxl_train_network.py"),
        (
            GUIDE_FIX + GUIDE_TRAINING,
            "expected one training command, found 2: sdxl_train_network.py, sdxl_train_network.py",
        ),
        (
            "flux_train_network.py --seed=1",
            "expected sdxl_train_network.py or sdxl_train.py, found flux_train_network.py",
        ),
        ('sdxl_train.py --vae="C:/x', 'a quote is not closed: "C:/x'),
        ("sdxl_train_network.py --seed=1", "the command names no model"),
        (f"{SHORT} --train_batch_size=0", "the command: [run] `batch`: input should be greater than"),
        ("none.bat", "none.bat does not exist"),
        (f"{SHORT} --config_file none", "--config_file none.toml does not exist"),
    ],
)
def test_errors(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["recipe", "import", text]) == 2
    output = capfd.readouterr().err
    assert f"error: {message}" in output
    assert list(tmp_path.iterdir()) == []


def test_unsupported_flags_are_listed_and_exit_with_1(tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "r.toml"
    text = f"{SHORT} --save_n_epoch_ratio=1 --no_such_thing"
    assert run(["recipe", "import", text, "-o", str(out)]) == 1
    output = capfd.readouterr().err
    assert "warning: --save_n_epoch_ratio=1: not supported: `run.save_every_epochs` counts epochs" in output
    assert "warning: --no_such_thing: unknown flag" in output
    assert re.search(r"2 of \d+ flags have no counterpart in spectune", output)
    assert "#   --no_such_thing: unknown flag" in out.read_text()
    assert load_recipe(out).run.name == "last"


def test_nothing_is_overwritten_without_force(tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "r.toml"
    out.write_text("mine")
    assert run(["recipe", "import", SHORT, "-o", str(out)]) == 2
    assert f"{out} exists" in " ".join(capfd.readouterr().err.split())
    assert out.read_text() == "mine"
    assert run(["recipe", "import", SHORT, "-o", str(out), "--force"]) == 0
    assert load_recipe(out).model.rank == 4


def test_paths_are_rebased_to_the_folder_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("deep").mkdir()
    text = SHORT.replace("m.safetensors", "models/m.safetensors").replace("output_dir o", "output_dir K:/o")
    assert run(["recipe", "import", text, "-o", "deep/r.toml"]) == 0
    data = tomllib.loads(Path("deep/r.toml").read_text())
    assert data["model"]["base"] == "../models/m.safetensors"
    assert data["data"]["folders"] == ["../d"]
    assert data["run"]["output"] == "K:/o"


def test_a_recipe_on_another_drive_gets_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def relpath(path: object, start: object) -> str:
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importer.os.path, "relpath", relpath)
    Path("deep").mkdir()
    assert run(["recipe", "import", SHORT, "-o", "deep/r.toml"]) == 0
    data = tomllib.loads(Path("deep/r.toml").read_text())
    assert data["model"]["base"] == (tmp_path / "m.safetensors").as_posix()


def test_keys_occur_once_and_in_the_order_of_recipes(tmp_path: Path) -> None:
    out = tmp_path / "r.toml"
    flags = "--seed=3 --cache_latents --cache_latents_to_disk --network_dim=8 --flip_aug --resolution=512"
    assert run(["recipe", "import", f"{SHORT} {flags}", "-o", str(out)]) == 0
    keys = re.findall(r"^(\w+) =", out.read_text(), flags=re.MULTILINE)
    assert keys == [
        *("base", "rank"),
        *("folders", "resolution_px", "flip_probability", "cache_latents", "cache_folder"),
        "enabled",
        "extensions",
        "kind",
        "learning_rate",
        *("name", "output", "steps", "seed"),
    ]
    assert load_recipe(out).data.cache_latents is True


def test_help_has_an_example(capfd: Any) -> None:
    assert run(["recipe", "import", "--help"]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "Example: spectune recipe import train.bat -o recipe.toml" in shown


def test_json_output(tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "r.toml"
    assert run(["recipe", "import", f"{SHORT} --sed=1", "-o", str(out), "--json"]) == 1
    record = json.loads(capfd.readouterr().out)
    assert (record["recipe"], record["understood"]) == (str(out), False)
    flags = {entry["flag"]: entry for entry in record["flags"]}
    assert flags["--train_data_dir=d"]["settings"] == {"data.folders": ["d"]}
    assert flags["--sed=1"] == {
        "flag": "--sed=1", "verdict": "unknown", "settings": {}, "why": "did you mean `seed`?"
    }  # fmt: skip
    assert run(["recipe", "import", GUIDE_FIX, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["replaced_by"].startswith("spectune split K:/")
