from __future__ import annotations

from pathlib import Path

from spectune.cli.reports.train import commands_after_training
from spectune.training.recipe.recipe import parse_recipe


def test_the_commands_name_the_files_of_the_recipe(tmp_path: Path) -> None:
    recipe = parse_recipe(
        {
            "model": {"base": tmp_path / "models" / "my base.safetensors", "rank": 2},
            "data": {"folders": [tmp_path], "resolution_px": 32},
            "run": {"name": "t", "output": tmp_path / "out", "steps": 1},
        }
    )
    commands = commands_after_training(recipe, folder=tmp_path)
    assert commands == [
        'spectune rebuild "models/my base.safetensors" out/t.safetensors -o out/t-checkpoint.safetensors',
        'spectune export "models/my base.safetensors" out/t.safetensors -o out/t-lora.safetensors',
        'spectune sample "models/my base.safetensors" out/t.safetensors -c "a picture" --size 32 '
        "-o out/t-pictures",
    ]
    elsewhere = commands_after_training(recipe, folder=tmp_path / "other")
    assert f"{tmp_path.as_posix()}/out/t.safetensors" in elsewhere[0]
