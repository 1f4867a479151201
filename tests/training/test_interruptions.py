"""Runs that are interrupted or meet a failure beside the training still leave a complete save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from spectune.model.offload import StagedModel
from spectune.training import output, state
from spectune.training.callbacks import Callbacks, StepInfo
from spectune.training.callbacks.console import ConsoleProgress
from spectune.training.loop import train
from tests.training.conftest import MakeRecipe


class Losses(Callbacks):
    """The loss of each step."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_step(self, info: StepInfo) -> None:
        self.by_step[info.step] = info.loss


def test_a_preview_that_fails_is_a_warning(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    class OutOfMemory(Callbacks):
        def on_preview(self, step: int, model: StagedModel) -> Image.Image | None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")

    plain, failing = Losses(), Losses()
    train(make_recipe(run={"output": tmp_path / "a"}), callbacks=[plain])
    run = {"output": tmp_path / "b", "preview_every_steps": 1, "save_every_steps": 1}
    report = train(make_recipe(run=run), callbacks=[failing, OutOfMemory()])
    assert failing.by_step == plain.by_step
    expected = "no preview of step 1: CUDA out of memory. Tried to allocate 2 GiB"
    assert expected in report.warnings
    assert not report.interrupted
    assert (tmp_path / "b" / "t.safetensors").is_file()


def test_a_save_that_cannot_be_removed_is_a_warning(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where another program has the file open."""
    plain = output.remove_whole

    def remove(path: Path) -> None:
        if "step00000001" in path.name:
            raise PermissionError(13, "The process cannot access the file")
        plain(path)

    monkeypatch.setattr(output, "remove_whole", remove)
    report = train(make_recipe(run={"save_every_steps": 1, "keep_last": 1, "steps": 3}))
    kept = "cannot remove the old save t-step00000001.state: The process cannot access the file"
    assert report.warnings.count(kept) == 1
    assert (tmp_path / "out" / "t-step00000003.state" / state.STATE).is_file()
    assert not (tmp_path / "out" / "t-step00000002.state").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the signal of a closed terminal on this system")
def test_a_closed_terminal_saves(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed:
        """The stream of a terminal that is gone."""

        def write(self, *text: str) -> int:
            raise OSError(5, "Input/output error")

        flush = isatty = fileno = write

    class Close(Callbacks):
        def on_step(self, info: StepInfo) -> None:
            if info.step == 2:
                monkeypatch.setattr("sys.stderr", Closed())
                monkeypatch.setattr("sys.stdout", Closed())
                signal.raise_signal(signal.SIGHUP)
            print("still running", file=sys.stderr)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    try:
        report = train(make_recipe(), callbacks=[Close(), ConsoleProgress()])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (report.interrupted, report.steps) == (True, 2)
    assert (tmp_path / "out" / "t-step00000002.state" / state.STATE).is_file()


def test_a_second_ctrl_c_saves_nothing_and_damages_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    class TwoSignals(Callbacks):
        def on_step(self, info: StepInfo) -> None:
            if info.step == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    recipe = make_recipe(run={"save_every_steps": 1})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[TwoSignals()])
    assert [path.name for path in output.saved_states(tmp_path / "out", "t")] == ["t-step00000001.state"]
    assert train(recipe).first_step == 1


SPAWNED = """
import multiprocessing, os, signal, sys, threading
from pathlib import Path
from spectune.training.callbacks import Callbacks
from spectune.training.loop import train
from spectune.training.recipe.file import load_recipe

class Interrupt(Callbacks):
    def on_step(self, info):
        if info.step == 2:
            # As a terminal does on Ctrl-C: to all processes. The next step needs more batches than are ready.
            threading.Timer(0.05, os.killpg, (0, signal.SIGINT)).start()

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    report = train(load_recipe(Path(sys.argv[1])), callbacks=[Interrupt()])
    assert report.interrupted, report
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups of POSIX")
def test_ctrl_c_with_spawned_workers_saves(
    tmp_path: Path, tiny_checkpoint: Path, picture_folder: Path
) -> None:
    recipe, script = tmp_path / "r.toml", tmp_path / "run.py"
    recipe.write_text(
        f"[model]\nbase = '{tiny_checkpoint}'\nrank = 2\n[data]\nfolders = ['{picture_folder}']\n"
        "resolution_px = 32\nworkers = 2\nrandom_crop = true\n[run]\nname = 't'\noutput = 'out'\n"
        "steps = 50\nbatch = 2\naccumulation = 8\ntensorboard = false\n",
        encoding="utf-8",
    )
    script.write_text(SPAWNED, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(recipe)],
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (state_folder,) = (tmp_path / "out").glob("t-step*.state")
    assert (state_folder / state.STATE).is_file()
