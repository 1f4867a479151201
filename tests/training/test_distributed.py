"""Two processes train the same as one process with accumulation 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectune.training.loop import train
from spectune.training.recipe.recipe import Recipe
from tests.training.conftest import MakeRecipe

PROGRAM = """
import json, sys
from spectune.training.loop import train
from spectune.training.recipe.recipe import parse_recipe
train(parse_recipe(json.loads(sys.argv[1])))
"""


def train_in_two_processes(recipe: Recipe, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    # one thread each; the CPU even if there is a GPU, because gloo transfers the gradients
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *launch, str(program), json.dumps(recipe.model_dump(mode="json"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def deltas(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(path).items() if "delta_" in name}


EDM2 = pytest.param({"weighting": "edm2"}, marks=pytest.mark.slow, id="edm2")


@pytest.mark.slow
@pytest.mark.parametrize("loss", [pytest.param({}, id="plain"), EDM2])
def test_two_processes_equal_one_with_accumulation_2(
    make_recipe: MakeRecipe, tmp_path: Path, loss: dict[str, Any]
) -> None:
    def recipe(name: str, accumulation: int) -> Recipe:
        run = {"name": name, "output": tmp_path / name, "steps": 3, "batch": 2, "accumulation": accumulation}
        # AdamW's first steps are lr * g/(|g| + eps): a small eps would amplify rounding errors of g
        optimizer = {"learning_rate": 1e-3, "options": {"eps": 1e-2}}
        data = {"random_crop": True, "flip_probability": 0.5}
        return make_recipe(data=data, loss=loss, run=run, optimizer=optimizer)

    train(recipe("one", 2))
    train_in_two_processes(recipe("two", 1), tmp_path)
    one, two = deltas(tmp_path / "one" / "one.safetensors"), deltas(tmp_path / "two" / "two.safetensors")
    assert one.keys() == two.keys()
    largest = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert largest <= 1e-6
    assert max(float(tensor.abs().max()) for tensor in one.values()) > 1e-4  # something was trained
