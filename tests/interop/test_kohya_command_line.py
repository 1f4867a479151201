"""Test all ways to paste a command, and all kinds of files that contain one."""

from __future__ import annotations

import io
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from spectune.cli.app import run
from spectune.errors import InputError
from spectune.interop.kohya.command_line import parse_command, split_words
from spectune.interop.kohya.config_files import parse_toml
from spectune.interop.kohya.gui import parse_gui_json
from spectune.interop.kohya.importer import import_command
from spectune.training.recipe.commented import nested, toml_item
from spectune.training.recipe.file import load_recipe
from tests.interop.kohya_commands import SHORT

FLAGS = {"pretrained_model_name_or_path": "C:/my models/m.safetensors", "network_dim": "8", "seed": "3"}

PASTED = {
    "cmd": """@echo off
REM accelerate launch sdxl_train_network.py --seed=9
call venv\\Scripts\\activate
accelerate launch --num_processes 2 "sd scripts\\sdxl_train_network.py" ^
  --pretrained_model_name_or_path="C:/my models/m.safetensors" ^
  --network_dim=8 ^
  --seed 3
pause
""",
    "bash": """#!/bin/bash
cd sd-scripts && accelerate launch ./sdxl_train_network.py \\
  --pretrained_model_name_or_path='C:/my models/m.safetensors' \\
  # --seed=9
  --network_dim 8 \\
  --seed=3 >> log.txt
""",
    "escaped space": "sdxl_train_network.py --pretrained_model_name_or_path C:/my\\ models/m.safetensors "
    "--network_dim=8 --seed=3",
    "powershell": """python .\\sdxl_train_network.py `
  --pretrained_model_name_or_path "C:/my models/m.safetensors" `
  --network_dim=8 `
  --seed=3""",
    "without continuation": """sdxl_train_network.py
--pretrained_model_name_or_path="C:/my models/m.safetensors"

--network_dim=8
--seed=3""",
    "one line": 'sdxl_train_network.py ^ --pretrained_model_name_or_path="C:/my models/m.safetensors" '
    "^ --network_dim=8 ^--seed=3 ^",
    "flags alone": '--pretrained_model_name_or_path="C:/my models/m.safetensors" --network-dim=8 --seed=3',
    "web page": "sdxl_train_network.py —pretrained_model_name_or_path=“C:/my models/m.safetensors” "
    "–network_dim=8\u00a0--seed=3",
    "powershell variables": """$model = "C:/my models/m.safetensors" # the base
$dim = 8
$more = [System.Collections.ArrayList]::new()
python "./sdxl_train_network.py" `
  --pretrained_model_name_or_path=$model `
  --network_dim=$dim --seed=3
Write-Output "done"
""",
    "variables": """set MODEL=C:/my models/m.safetensors
set "DIM=8"
python sdxl_train_network.py --pretrained_model_name_or_path="%MODEL%" --network_dim=%DIM% --seed=3""",
    "shell variables": """model="C:/my models/m.safetensors"  # the base
export DIM=8
python sdxl_train_network.py --pretrained_model_name_or_path="$model" --network_dim=${DIM} --seed=3""",
}


@pytest.mark.parametrize("text", PASTED.values(), ids=PASTED.keys())
def test_every_way_to_paste_gives_the_same_flags(text: str) -> None:
    command = parse_command(text)
    assert {flag.name: command.value(flag.name) for flag in command.flags} == FLAGS
    assert command.notes == ()


def test_windows_paths_keep_their_backslashes(tmp_path: Path) -> None:
    out = tmp_path / "r.toml"
    text = r'sdxl_train_network.py --pretrained_model_name_or_path="D:\models\new\m.safetensors" '
    text += r"--train_data_dir D:\data\train --output_dir=\\nas\out --vae=D:\vae"
    assert run(["recipe", "import", text, "-o", str(out)]) == 0
    assert "folders = ['D:\\data\\train']" in out.read_text()
    data = tomllib.loads(out.read_text())
    assert data["model"]["base"] == r"D:\models\new\m.safetensors"
    assert (data["run"]["output"], data["vae"]["path"]) == (r"\\nas\out", r"D:\vae")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (r"D:\new", r"'D:\new'"),
        (r"D:\it's", '"D:\\\\it\'s"'),
        ('a "b"', '"a \\"b\\""'),
        ("tab\t", '"tab\\t"'),
        ("Zoë", '"Zoë"'),
        (1e-05, "1e-05"),
        (True, "true"),
        ([0.8, "x"], '[0.8, "x"]'),
    ],
)
def test_toml_values_read_back(value: Any, written: str) -> None:
    assert toml_item(value).as_string() == written
    assert tomllib.loads(f"x = {written}")["x"] == value


def test_unix_escapes_and_quotes_within_words() -> None:
    assert split_words(r"""a\ b "c\"d" --x='e f' it's""") == ["a b", 'c"d', "--x=e f", "it's"]
    assert split_words(r"""C:\a\ b "C:\d\" """) == ["C:\\a\\", "b", "C:\\d\\"]


def test_scripts_of_every_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "REM größe\npython sdxl_train_network.py --pretrained_model_name_or_path=größe.safetensors ^\r\n"
    text += "--train_data_dir=d --output_dir=o\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        script = tmp_path / f"{encoding}.bat"
        script.write_bytes(text.encode(encoding))
        out = tmp_path / f"{encoding}.toml"
        assert run(["recipe", "import", str(script), "-o", str(out)]) == 0
        base = load_recipe(out).model.base
        assert base is not None
        assert base.name == "größe.safetensors", encoding


def test_a_command_on_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(SHORT))
    assert run(["recipe", "import", "-", "-o", str(tmp_path / "r.toml")]) == 0


CONFIG = """
[model_arguments]
pretrained_model_name_or_path = 'D:\\models\\m.safetensors'
network_dim = 16
[training_arguments]
train_data_dir = "d"
output_dir = "o"
gradient_checkpointing = true
flip_aug = false
optimizer_args = ["weight_decay=0.1"]
text_encoder_lr = [1e-5, 2e-5]
unet_lr = 1e-4
"""


def test_a_configuration_file_with_sections(tmp_path: Path) -> None:
    config = tmp_path / "kohya.toml"
    config.write_text(CONFIG)
    out = tmp_path / "r.toml"
    assert run(["recipe", "import", str(config), "-o", str(out)]) == 0
    data = tomllib.loads(out.read_text())
    assert data["model"] == {"base": r"D:\models\m.safetensors", "rank": 16}
    assert data["optimizer"]["options"] == {"weight_decay": 0.1}
    assert data["optimizer"]["part_learning_rates"] == {"unet": 1e-4, "te1": 1e-5, "te2": 2e-5}
    assert data["run"]["gradient_checkpointing"] is True
    assert "flip_probability" not in data["data"]


def test_a_command_overrides_its_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kohya.toml").write_text(CONFIG)
    assert run(["recipe", "import", "sdxl_train_network.py --config_file kohya --network_dim=8"]) == 0
    assert load_recipe(Path("recipe.toml")).model.rank == 8


def gui_settings(**changes: Any) -> str:
    settings = {
        "LoRA_type": "LyCORIS/LoCon",
        "LyCORIS_preset": "full",
        "additional_parameters": "--zero_terminal_snr",
        "conv_dim": 8,
        "epoch": 2,
        "factor": -1,
        "flip_aug": False,
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "lr_warmup": 10,
        "max_resolution": "1024,1024",
        "max_train_steps": 400,
        "min_snr_gamma": 0,
        "network_dim": 16,
        "optimizer": "AdamW8bit",
        "optimizer_args": "weight_decay=0.1 betas=(0.9,0.99)",
        "output_dir": "o",
        "pretrained_model_name_or_path": "m.safetensors",
        "sdxl": True,
        "train_data_dir": "d",
        "unet_lr": 0.0,
        "v_parameterization": True,
        "xformers": "xformers",
    }
    return json.dumps(settings | changes)


def test_settings_of_the_interface() -> None:
    imported = import_command(parse_gui_json(gui_settings(epoch=0), "x.json"), folder=Path())
    data = nested(imported.settings)
    assert imported.understood
    assert data["model"] == {"base": "m.safetensors", "rank": 16, "conv_rank": 8}
    assert data["objective"] == {"kind": "v", "zero_terminal_snr": True}
    assert data["optimizer"] == {
        "name": "adamw8bit",
        "learning_rate": 1e-4,
        "schedule": "cosine",
        "warmup_steps": 40,
        "options": {"weight_decay": 0.1, "betas": [0.9, 0.99]},
    }
    assert (data["run"]["steps"], data["data"]["resolution_px"]) == (400, 1024)
    assert imported.notes[0] == "dropped: 4 settings that are off, empty or zero"


def test_settings_of_the_interface_for_another_model(tmp_path: Path, capfd: Any) -> None:
    path = tmp_path / "x.json"
    path.write_text(gui_settings(sdxl=False))
    assert run(["recipe", "import", str(path)]) == 2
    assert "x.json does not train SDXL: its `sdxl` is off" in capfd.readouterr().err
    path.write_text("[]")
    assert run(["recipe", "import", str(path)]) == 2
    assert "x.json contains no settings" in capfd.readouterr().err


def test_a_toml_without_settings() -> None:
    with pytest.raises(InputError, match=r"c\.toml contains no settings"):
        parse_toml("flip_aug = false", "c.toml")
