"""The notebook for Colab and Kaggle: its code cells, without Jupyter."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "spectune.ipynb"


def cells() -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"])


def sources() -> list[str]:
    return ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]


def test_the_cells_are_valid_and_have_no_outputs() -> None:
    for cell in cells():
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    for source in sources():
        python = "\n".join(line for line in source.splitlines() if not line.startswith(("!", "%")))
        ast.parse(python)


@pytest.mark.parametrize("word", ["doctor", "dataset", "sample"])
def test_the_shell_commands_exist(word: str) -> None:
    lines = [line for source in sources() for line in source.splitlines()]
    line = next(line for line in lines if line.startswith(f"!spectune {word}"))
    options = [option for option in shlex.split(line) if option.startswith("--")]
    reference = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert [option for option in options if f"{option}`" not in reference] == []


@pytest.mark.slow
def test_the_code_cells_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    names: dict[str, Any] = {}
    for source in sources():
        if "%pip" in source:
            continue
        if source.startswith("!"):
            filled = re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), source[1:])
            assert filled.startswith("spectune ")
            command = [sys.executable, "-m", *shlex.split(filled)]
            done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        else:
            source = re.sub(r"^(STEPS|RANK) = \d+", r"\1 = 2", source, flags=re.MULTILINE)
            exec(compile(source, "cell", "exec"), names)
    assert names["report"].steps == 2
    assert (tmp_path / "runs" / "style-lora.safetensors").is_file()
    assert (tmp_path / "runs" / "sheet.png").is_file()
