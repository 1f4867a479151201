from __future__ import annotations

import shlex
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import pytest

from spectune.cli.next_commands import commands_after_training, quoted
from spectune.training.recipe.recipe import parse_recipe


@pytest.mark.parametrize(
    ("path", "windows", "expected"),
    [
        ("out/style.safetensors", False, "out/style.safetensors"),
        ("my models/a (1).safetensors", False, '"my models/a (1).safetensors"'),
        ("a,b;c&d@.safetensors", False, '"a,b;c&d@.safetensors"'),
        ("it's.safetensors", False, '"it\'s.safetensors"'),
        ("gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n.safetensors", False, None),
        ("$HOME `x`!.safetensors", False, "'$HOME `x`!.safetensors'"),
        ("C:\\my models\\a.safetensors", True, '"C:/my models/a.safetensors"'),
        ("C:\\models\\$a.safetensors", True, '"C:/models/$a.safetensors"'),
    ],
)
def test_paths_are_one_argument(path: str, windows: bool, expected: str | None) -> None:
    made = quoted(cast("Any", PureWindowsPath(path) if windows else Path(path)), windows=windows)
    assert made == (f'"{path}"' if expected is None else expected)
    if not windows:
        assert shlex.split(made) == [path]


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
