"""The commands that write files, with small inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from spectune.files.writer import write_tensors
from spectune.ops.export import export
from spectune.ops.split import split
from spectune.ops.train import train
from spectune.sdxl.layout import hints_metadata
from tests.layouts import TINY, build_modules

SAVE_STEPS = 3  # between two saves of the training
STEPS = 8


@dataclass(frozen=True)
class Job:
    """A command line. `{i}` is the folder of the inputs, `{o}` the folder of the outputs."""

    name: str
    line: str
    inputs: tuple[str, ...] = ()  # model files that it reads
    whole: tuple[str, ...] = ()  # folders that appear with all their files or not at all

    def arguments(self, inputs: Path, out: Path, *, force: bool = False) -> list[str]:
        """Return the words of the command line."""
        words = [word.format(i=inputs, o=out) for word in self.line.split()]
        return [*words, "--force"] if force else words


_DRAW = "-c cat -c dog --size 32 --steps 1 --cfg 1 --device cpu"
JOBS = (
    Job("split", "split {i}/model.safetensors --rank 4 -o {o}", ("model.safetensors",)),
    Job(
        "rebuild",
        "rebuild {i}/model.safetensors {i}/tuned.safetensors -o {o}/x.safetensors",
        ("model.safetensors", "tuned.safetensors"),
    ),
    Job(
        "rebuild --card",
        "rebuild {i}/model.residual.safetensors {i}/model.principal-r4.safetensors "
        "-o {o}/x.safetensors --card",
        ("model.residual.safetensors", "model.principal-r4.safetensors"),
    ),
    Job(
        "export",
        "export {i}/model.safetensors {i}/tuned.safetensors -o {o}/x.safetensors",
        ("model.safetensors", "tuned.safetensors"),
    ),
    Job(
        "slice",
        "slice {i}/lora.safetensors:unet:0.3 {i}/lora.safetensors:unet:0.8 --base {i}/model.safetensors "
        "-o {o}/x.safetensors",
        ("lora.safetensors",),
    ),
    Job(
        "merge",
        "merge {i}/model.safetensors:0.7 {i}/other.safetensors:0.3 -o {o}/x.safetensors",
        ("model.safetensors", "other.safetensors"),
    ),
    Job(
        "convert",
        "convert {i}/lora.safetensors --base {i}/model.safetensors --keys diffusers -o {o}/x.safetensors",
        ("lora.safetensors",),
    ),
    Job(
        "convert to shards",
        "convert {i}/model.safetensors -o {o}/x.safetensors.index.json",
        ("model.safetensors",),
    ),
    Job(
        "convert to a folder", "convert {i}/model.safetensors -o {o}/x", ("model.safetensors",), whole=("x",)
    ),
    Job("null", "null {i}/model.safetensors -o {o}/x.safetensors", ("model.safetensors",)),
    Job(
        "sample",
        "sample {i}/model.safetensors {i}/lora.safetensors -o {o}/p --sheet {o}/x.png --metadata " + _DRAW,
        ("model.safetensors", "lora.safetensors"),
    ),
    Job(
        "compare",
        "compare {i}/model.safetensors {i}/other.safetensors -o {o}/x.png " + _DRAW,
        ("model.safetensors", "other.safetensors"),
    ),
    Job("inspect --plot", "inspect {i}/model.safetensors --plot {o}/x.png", ("model.safetensors",)),
    Job("dataset --sheet", "dataset {i}/pictures --sheet {o}/x.png --resolution 64"),
    Job(
        "new",
        "new {i}/model.safetensors {i}/pictures -o {o}/x.toml --vram 12GB --yes",
        ("model.safetensors",),
    ),
    Job("recipe import", "recipe import {i}/train.bat -o {o}/x.toml"),
    Job("train", "train {i}/recipe.toml --set run.output={o}", ("model.safetensors",)),
)

_RECIPE = f"""\
[model]
base = "model.safetensors"
rank = 2
parts = ["unet"]
layers = ["unet.*attn2.to_k"]

[data]
folders = ["pictures"]
resolution_px = 32

[optimizer]
learning_rate = 1e-2

[run]
name = "t"
steps = {STEPS}
batch = 2
save_every_steps = {SAVE_STEPS}
keep_last = 2
tensorboard = false
device = "cpu"
"""
_COMMAND = """\
accelerate launch sdxl_train_network.py --pretrained_model_name_or_path model.safetensors
--train_data_dir pictures --output_dir out --output_name t --network_module networks.lora --network_dim 4
--learning_rate 1e-4 --max_train_steps 10
"""


def make_inputs(folder: Path) -> None:
    """Write two models, a split, a training's adapter, a LoRA, pictures, a recipe and a command."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(("model", "other")):
        write_model(folder / f"{name}.safetensors", seed=seed)
    split(folder / "model.safetensors", folder, rank=4)
    levels = np.random.default_rng(0)
    for index in range(4):
        path = folder / "pictures" / "2_shape" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        square = levels.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(square).resize((40, 40), Image.Resampling.BICUBIC).save(path)
        path.with_suffix(".txt").write_text(f"shape {index}, red\n", encoding="utf-8")
    (folder / "recipe.toml").write_text(_RECIPE, encoding="utf-8")
    (folder / "train.bat").write_text(" ".join(_COMMAND.split()) + "\n", encoding="utf-8")
    short = folder / "short"
    train(folder / "recipe.toml", overrides=("run.steps=2", f"run.output={short}"), show_progress=False)
    (short / "t.safetensors").replace(folder / "tuned.safetensors")
    export(folder / "tuned.safetensors", folder / "lora.safetensors", base=folder / "model.safetensors")


def write_model(path: Path, *, seed: int) -> None:
    """Write a small SDXL with random weights in float16."""
    torch.manual_seed(seed)
    tensors = {
        name: (tensor + 0.02 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor)
        for name, tensor in build_modules(TINY).single_file().items()
    }
    halves = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    write_tensors(path, halves, metadata=hints_metadata(TINY))
