"""Several processes train the same as one process with accumulation, share the work, and stop together."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectune.training.data import latents
from spectune.training.loop import train
from spectune.training.recipe.recipe import Recipe
from tests.training.conftest import MakeRecipe

# Counts encoded images and the bytes of the gradients that DDP sends, and changes the input of one process.
PROGRAM = """
import json, os, shutil, sys
from pathlib import Path
import torch
from spectune.cli.console import print_error
from spectune.errors import SpectuneError
from spectune.model.network import Sdxl
from spectune.training import loop
from spectune.training.data import latents
from spectune.training.recipe.recipe import parse_recipe

rank, task = os.environ["RANK"], json.loads(sys.argv[1])
images, sent = [], []
latents.ENCODE_BATCH = 1  # few images are divided among the processes
encode, connect = Sdxl.encode_posteriors, loop.make_accelerator
Sdxl.encode_posteriors = lambda model, pixels: images.append(len(pixels)) or encode(model, pixels)
if rank == "1":
    for section, keys in task["second"].items():
        task["recipe"][section] = {**task["recipe"].get(section, {}), **keys}

def hook(state, bucket):
    sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
    return torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(None, bucket)

def connected(recipe):
    accelerator = connect(recipe)
    prepare = accelerator.prepare

    def prepared(*things, **options):
        made = prepare(*things, **options)
        if len(things) == 2:  # the network and its optimizer
            made[0].register_comm_hook(None, hook)
        return made

    accelerator.prepare = prepared
    return accelerator

loop.make_accelerator = connected
try:
    report = loop.train(parse_recipe(task["recipe"]))
except SpectuneError as error:
    if not error.is_reported:
        print_error(error)
    sys.exit(error.exit_code)
counts = {"images": sum(images), "sent": sum(sent), "interrupted": report.interrupted}
Path(task["counts"], f"{rank}.json").write_text(json.dumps(counts))
"""


def start(
    recipe: Recipe, folder: Path, processes: int, second: Mapping[str, Any] | None = None
) -> subprocess.Popen[str]:
    """Start a training in several processes; `second` changes sections of the second process' recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "program.py"
    program.write_text(PROGRAM)
    task = {"recipe": recipe.model_dump(mode="json"), "counts": str(folder), "second": second or {}}
    launch = [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        "--master_port=0",
        "--standalone",
    ]
    # one thread each; the CPU even if there is a GPU, because gloo transfers the gradients
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launch, str(program), json.dumps(task)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(recipe: Recipe, folder: Path, processes: int, **options: Any) -> tuple[int, str]:
    """Train in several processes; return the exit code and stderr."""
    started = start(recipe, folder, processes, **options)
    _, errors = started.communicate(timeout=240)
    return started.returncode, errors


def train_in_two_processes(recipe: Recipe, folder: Path) -> None:
    """Train in two processes; the test fails if they do."""
    code, errors = run(recipe, folder / "counts", 2)
    assert code == 0, errors[-3000:]


def counts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("[0-9].json"))]


def deltas(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(path).items() if "delta_" in name}


def largest_difference(first: Path, second: Path) -> float:
    one, two = deltas(first), deltas(second)
    assert one.keys() == two.keys()
    assert max(float(tensor.abs().max()) for tensor in one.values()) > 1e-4  # something was trained
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.fixture
def recipe_for(make_recipe: MakeRecipe, tmp_path: Path) -> Any:
    """Return a function that makes the recipe of a run; runs of equal images per step train the same."""

    def make(name: str, accumulation: int, **sections: Any) -> Recipe:
        run = {"name": name, "output": tmp_path / name, "steps": 3, "batch": 2, "accumulation": accumulation}
        # AdamW's first steps are lr * g/(|g| + eps): a small eps would amplify rounding errors of g
        optimizer = {"learning_rate": 1e-3, "options": {"eps": 1e-2}}
        data = {"random_crop": True, "flip_probability": 0.5, **sections.pop("data", {})}
        return make_recipe(data=data, run={**run, **sections.pop("run", {})}, optimizer=optimizer, **sections)

    return make


EDM2 = pytest.param({"weighting": "edm2"}, marks=pytest.mark.slow, id="edm2")


@pytest.mark.parametrize("loss", [pytest.param({}, id="plain"), EDM2])
def test_two_processes_equal_one_with_accumulation_2(
    recipe_for: Any,
    picture_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loss: dict[str, Any],
) -> None:
    monkeypatch.setattr(latents, "ENCODE_BATCH", 1)
    data = {"random_crop": False, "validation_folder": picture_folder / "held_out"}
    one = train(recipe_for("one", 2, loss=loss, data=data))
    code, errors = run(recipe_for("two", 1, loss=loss, data=data), tmp_path / "counts", 2)
    assert code == 0, errors[-3000:]
    files = tmp_path / "one" / "one.safetensors", tmp_path / "two" / "two.safetensors"
    assert largest_difference(*files) <= 1e-6
    first, second = counts(tmp_path / "counts")
    views = 2 * 6 + 2  # of training, also mirrored, and of validation
    assert first["images"] == second["images"] == views / 2
    if not loss:
        trained = sum(tensor.numel() for tensor in deltas(files[0]).values())
        assert first["sent"] == second["sent"] == 3 * 4 * trained  # steps, bytes of float32
    assert one.validation_after is not None


@pytest.mark.slow
def test_four_processes_continue_with_two_after_a_kill(recipe_for: Any, tmp_path: Path) -> None:
    train(recipe_for("one", 4, run={"steps": 4}))
    saving = {"save_every_steps": 2}
    code, errors = run(recipe_for("two", 1, run={"steps": 2, **saving}), tmp_path / "a", 4)
    assert code == 0, errors[-3000:]
    recipe = recipe_for("two", 2, run={"steps": 4, **saving})
    started = start(recipe, tmp_path / "b", 2)
    time.sleep(1)
    started.kill()
    started.communicate()
    code, errors = run(recipe, tmp_path / "c", 2)
    assert code == 0, errors[-3000:]
    assert (
        largest_difference(tmp_path / "one" / "one.safetensors", tmp_path / "two" / "two.safetensors") <= 1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"optimizer": {"learning_rate": 2e-3}},
            "the recipe of process 0 on .* and of process 1 on .* differ",
        ),
        ({"data": {"folders": ["/nowhere"]}}, "process 1 on .*: .*/nowhere"),
    ],
    ids=["another recipe", "missing pictures"],
)
def test_different_inputs_stop_all_processes_with_one_message(
    recipe_for: Any, tmp_path: Path, second: dict[str, Any], message: str
) -> None:
    started = time.monotonic()
    code, errors = run(recipe_for("two", 1), tmp_path / "counts", 2, second=second)
    assert code != 0
    assert time.monotonic() - started < 120  # far below the timeout: no process waits for another
    assert len(re.findall("^error: ", errors, re.MULTILINE)) == 1
    assert re.search(rf"^error: {message}", errors, re.MULTILINE), errors[-3000:]
    assert not list((tmp_path / "two").glob("*.safetensors"))


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves(recipe_for: Any, tmp_path: Path) -> None:
    recipe = recipe_for("two", 1, run={"steps": 100_000, "save_every_steps": 1_000_000})
    started = start(recipe, tmp_path / "counts", 2)
    assert started.stderr is not None
    time.sleep(45)  # until steps are taken
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=60)
    (state,) = (tmp_path / "two").glob("*.state")
    assert (state / "state.json").is_file()
