"""Targets: recipes in TOML, and commands and settings of kohya's sd-scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from spectune.errors import SpectuneError
from spectune.interop.kohya.flags import RULES
from spectune.ops.recipe_import import recipe_import
from spectune.training.recipe.file import load_recipe
from tests.fuzz.harness import BadOutput
from tests.fuzz.mutation import (
    NUMBERS,
    TEXTS,
    change_bytes,
    change_json,
    change_text,
    mutated,
    sometimes_grown,
    text_bytes,
)
from tests.interop.kohya_commands import GUIDE_FIX, GUIDE_TRAINING, SHORT

ROOT = Path(__file__).resolve().parents[3]
RECIPES = tuple(sorted((ROOT / "recipes").glob("*.toml")))
SET = "#set "  # lines that begin with this are overrides

ALL_KEYS = """
[model]
base = "m.safetensors"
rank = 4
conv_rank = 2
layers = ["unet.*attn2*", "!conv"]
[data]
folders = ["a", "b"]
resolution_px = [512, 768]
mask = "file"
mask_suffix = ".mask.png"
caption = {extensions = [".txt"], shuffle = true, keep_tokens = 1, wildcards = true, max_tokens = 150}
bucket = {enabled = true, min_px = 256, max_px = 1024, step_px = 64}
[[data.sets]]
path = "c"
repeats = 3
[optimizer]
name = "adamw"
learning_rate = 1e-4
schedule = "cosine"
warmup_steps = 10
part_learning_rates = {unet = 1e-4}
options = {betas = [0.9, 0.99], weight_decay = 0.01}
[loss]
kind = "huber"
weighting = "min_snr"
[run]
name = "x"
output = "out"
steps = 10
save_every_steps = 5
preview_every_steps = 5
#set run.steps=200
#set model.parts=unet,te1
"""


class Recipes:
    """Recipes in TOML, with overrides in lines that begin with `#set `."""

    name = "recipes"
    is_for_bytes = True

    def seeds(self) -> Sequence[bytes]:
        return [ALL_KEYS.encode(), *(path.read_bytes() for path in RECIPES)]

    def inputs(self) -> SearchStrategy[bytes]:
        texts = [seed.decode() for seed in self.seeds()]
        common = (
            mutated([_without_comments(text) for text in texts], _change_recipe).map(text_bytes)
            | mutated(texts, change_text).map(text_bytes)
            | mutated(self.seeds(), change_bytes, most=2)
        )
        return sometimes_grown(common, self.seeds(), 200_000)

    def write(self, folder: Path, data: bytes) -> None:
        (folder / "recipe.toml").write_bytes(data)

    def operate(self, folder: Path) -> None:
        path = folder / "recipe.toml"
        lines = path.read_bytes().decode(errors="surrogateescape").splitlines()
        load_recipe(path, [line.removeprefix(SET) for line in lines if line.startswith(SET)])

    def arguments(self, folder: Path) -> list[str]:
        return ["train", "recipe.toml", "--dry-run"]


def _without_comments(text: str) -> str:
    return re.sub(r"(?m)^#(?!set ).*\n| +# .*$", "", text)


def _change_recipe(text: str, random: Random) -> str:
    """Replace a value of a recipe by an odd one, or change its text."""
    lines = text.split("\n")
    places = [place for place, line in enumerate(lines) if "=" in line]
    if not places or random.random() < 0.2:
        return change_text(text, random)
    place = random.choice(places)
    key, _, _ = lines[place].partition("=")
    lines[place] = f"{key}={_toml_value(random)}"
    return "\n".join(lines)


def _toml_value(random: Random) -> str:
    odd = random.choice((*NUMBERS, *TEXTS, True, [], ["a", 1], {}))
    if isinstance(odd, bool | list):
        return json.dumps(odd)
    if isinstance(odd, dict):
        return "{a = 1, b = {c = []}}"
    return json.dumps(odd) if isinstance(odd, str) and random.random() < 0.7 else str(odd)


CONFIG = """pretrained_model_name_or_path = "m.safetensors"
train_data_dir = "d"
output_dir = "o"
network_dim = 8
learning_rate = 1e-4
optimizer_args = ["weight_decay=0.1"]
"""
DATASET = """
[general]
shuffle_caption = true
[[datasets]]
resolution = [768, 768]
batch_size = 3
enable_bucket = true
  [[datasets.subsets]]
  image_dir = "img"
  num_repeats = 4
  class_tokens = "a cat"
"""
SETTINGS: dict[str, Any] = {
    "LoRA_type": "Standard",
    "sdxl": True,
    "pretrained_model_name_or_path": "m.safetensors",
    "train_data_dir": "img",
    "output_dir": "o",
    "learning_rate": 1e-4,
    "unet_lr": 1e-4,
    "network_dim": 8,
    "epoch": 10,
    "max_train_steps": 0,
    "optimizer": "AdamW",
    "lr_scheduler": "cosine",
    "lr_warmup": 10,
    "max_resolution": "1024,1024",
    "additional_parameters": "--flip_aug",
    "optimizer_args": "a=1",
}
SCRIPT = f"""@echo off
set M=m.safetensors
rem a comment
cd sd-scripts && {SHORT.replace("m.safetensors", "%M%")} ^
  --network_dim=4 --optimizer_args "weight_decay=0.1" "betas=(0.9, 0.99)"
pause
"""


class Kohya:
    """Commands and settings for `recipe import`. The first line is the suffix of the file."""

    name = "kohya"
    is_for_bytes = True

    def seeds(self) -> Sequence[bytes]:
        scripts = [SHORT, GUIDE_TRAINING, SCRIPT]
        return [
            *(text_bytes(f".bat\n{text}") for text in scripts),
            text_bytes(f".toml\n{CONFIG}"),
            text_bytes(f".toml\n{DATASET}"),
            text_bytes(f".json\n{json.dumps(SETTINGS, indent=1)}"),
        ]

    def inputs(self) -> SearchStrategy[bytes]:
        texts = [*(seed.decode() for seed in self.seeds()), f".sh\n{GUIDE_FIX}"]
        flags = st.lists(st.builds(_flag, st.sampled_from(list(RULES)), st.randoms(use_true_random=True)))
        common = (
            flags.map(lambda found: text_bytes(f".sh\n{SHORT} {' '.join(found)}"))
            | mutated([SETTINGS], change_json).map(lambda value: text_bytes(f".json\n{json.dumps(value)}"))
            | mutated(texts, change_text).map(text_bytes)
            | mutated(self.seeds(), change_bytes, most=2)
        )
        return sometimes_grown(common, self.seeds(), 400_000)

    def write(self, folder: Path, data: bytes) -> None:
        suffix, _, content = data.partition(b"\n")
        if suffix not in (b".bat", b".sh", b".ps1", b".toml", b".json", b".txt"):
            suffix, content = b".bat", data
        (folder / f"x{suffix.decode()}").write_bytes(content)

    def operate(self, folder: Path) -> None:
        report = recipe_import(str(self._path(folder)), Path("recipe.toml"))
        if report.path is not None:
            try:
                load_recipe(report.path)
            except SpectuneError as error:
                raise BadOutput(f"the written recipe is not valid: {error}") from error

    def arguments(self, folder: Path) -> list[str]:
        return ["recipe", "import", self._path(folder).name, "-o", "recipe.toml"]

    def _path(self, folder: Path) -> Path:
        return next(folder.glob("x.*"))


def _flag(name: str, random: Random) -> str:
    """Return a flag with an odd value."""
    value = str(random.choice((*NUMBERS, *TEXTS, "1", "2", "0.5", "1e-4", "512,512", "a=1", "cosine")))
    match random.randrange(4):
        case 0:
            return f"--{name}"
        case 1:
            return f"--{name} {value}"
        case 2:
            return f'--{name}="{value}"'
        case _:
            return f"--{name}={value}"
