from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spectune.errors import InputError
from spectune.training.callbacks import Callbacks, StepInfo
from spectune.training.loop import train
from spectune.training.resume.lock import locked_output
from tests.training.conftest import MakeRecipe


def test_a_second_training_into_the_folder_is_one_error(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    class Second(Callbacks):
        def on_step(self, info: StepInfo) -> None:
            with pytest.raises(InputError, match=f"another training writes to .*: process {os.getpid()} on"):
                train(make_recipe(run={"steps": 9}))

    report = train(make_recipe(run={"steps": 1}), callbacks=[Second()])
    assert report.steps == 1
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_runs_of_other_names_share_a_folder(tmp_path: Path) -> None:
    with locked_output(tmp_path, "a", print), locked_output(tmp_path, "b", print):
        assert json.loads((tmp_path / ".a.owner.json").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
from spectune.training.resume.lock import locked_output
with locked_output(Path(sys.argv[1]), "a", print):
    os._exit(3)  # like a kill: nothing is removed
"""


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == 3
    warnings: list[str] = []
    with locked_output(tmp_path, "a", warnings.append):
        pass
    (warning,) = warnings
    assert warning.startswith("the lock of process ")
    assert "that process ended without removing it" in warning
    assert list(tmp_path.iterdir()) == []


def test_an_error_before_any_work_leaves_no_folder(tmp_path: Path) -> None:
    def fail() -> None:
        with locked_output(tmp_path / "new" / "out", "a", print):
            raise InputError("no pictures")

    with pytest.raises(InputError, match="no pictures"):
        fail()
    assert list(tmp_path.iterdir()) == []
