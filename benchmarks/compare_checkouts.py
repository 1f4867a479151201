"""Run the same commands in two checkouts and compare the files they write, tensor by tensor and bit for bit.

    python dev.py bench compare_checkouts BEFORE AFTER [--work FOLDER] [--only WORD]

BEFORE and AFTER are folders with one checkout each, such as two git worktrees. Both run in this interpreter's
environment, on the embedded base of AFTER. The script prints every tensor and metadata entry that differs. It
exits with 1 if a tensor or a file name differs; different metadata alone is not a failure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HEADER_LENGTH_BYTES = 8

# Every command runs in the output folder of its checkout; {base}, {images} and {recipe} are inputs of both.
SPLIT = {
    "split": "split {base} --rank 16 -o parts",
    "split float32": "split {base} --rank 16 --residual-dtype float32 -o exact",
    "split energy": "split {base} --energy 0.8 --layers unet,!conv --no-residual -o energy",
    "split budget": "split {base} --budget 2MB --dtype bfloat16 -o budget",
    "split all layers": "split {base} --rank 4 --conv-rank 2 --layers all --svd exact -o all",
    "null": "null {base} -o null.safetensors",
}
TRAIN = {
    "train delta": "train {recipe} --set run.name=delta",
    "train encoders": 'train {recipe} --set run.name=encoders --set model.parts=["unet","te1","te2"] '
    "--set run.ema_decay=0.9",
    "train residual": "train {recipe} --set run.name=residual --set model.form=residual "
    '--set model.base="parts/base.residual.safetensors"',
    "train prodigy flow": "train {recipe} --set run.name=flow --set objective.kind=flow "
    "--set objective.flow_shift=2.5 --set loss.kind=fft_l1 "
    '--set optimizer={{name="prodigy_plus_schedule_free",learning_rate=1.0}}',
}
FILES = {
    "rebuild": "rebuild delta/delta.safetensors --base {base} -o tuned.safetensors",
    "rebuild pair": "rebuild exact/base.principal-r16.safetensors --base exact/base.residual.safetensors "
    "-o again.safetensors",
    "rebuild cast": "rebuild encoders/encoders.safetensors --base {base} --strength unet=0.8,te=0.5 "
    "--dtype bfloat16 --cast-all -o cast.safetensors",
    "rebuild shards": "rebuild flow/flow.safetensors --base {base} -o shards/flow.safetensors.index.json",
    "export": "export delta/delta.safetensors --base {base} -o lora.safetensors",
    "export rank": "export encoders/encoders.safetensors --base {base} --rank 8 --keys diffusers "
    "-o peft.safetensors",
    "export energy": "export encoders/encoders.safetensors --base {base} --energy 0.9 --dtype bfloat16 "
    "-o energy_lora.safetensors",
    "export size": "export encoders/encoders.safetensors --size 1MB --base {base} --keys comfyui "
    "-o size_lora.safetensors",
    "export principal": "export encoders/encoders.safetensors --form principal --base {base} "
    "-o tuned_principal.safetensors",
    "export difference": "export tuned.safetensors --base {base} --rank 8 -o difference.safetensors",
    "slice tuned": "slice encoders/encoders.safetensors:te delta/delta.safetensors:unet "
    "-o sliced.safetensors",
    "slice sum": "slice lora.safetensors:unet:0.5 size_lora.safetensors --base {base} -o summed.safetensors",
    "slice content": "slice lora.safetensors:content --base {base} --keys diffusers -o content.safetensors",
    "slice parts": "slice {base}:te tuned.safetensors:unet {base}:vae -o swapped.safetensors",
    "convert": "convert lora.safetensors --base {base} --keys comfyui --dtype float32 -o comfyui.safetensors",
    "convert alphas": "convert peft.safetensors --base {base} --even-alphas -o even.safetensors",
    "convert principal": "convert tuned_principal.safetensors --base {base} "
    "--principal parts/base.principal-r16.safetensors -o deltas.safetensors",
    "convert folder": "convert {base} -o folder",
    "convert back": "convert folder -o back.safetensors",
}
RECIPE = """[model]
base = "{base}"
principal = "parts/base.principal-r16.safetensors"
parts = ["unet"]
[data]
folders = ["{images}"]
resolution_px = 64
caption.dropout_probability = 0.1
[objective]
kind = "eps"
[optimizer]
name = "adamw"
learning_rate = 5e-4
[run]
name = "run"
output = "{output}"
steps = 20
batch = 4
seed = 1
"""


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file, with the hash of every tensor."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, str]  # name -> "dtype shape sha256"


def read_file(path: Path) -> Header:
    """Return the metadata and the tensors of a safetensors file, without using code of a checkout."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:HEADER_LENGTH_BYTES], "little")
    table = json.loads(raw[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + length])
    metadata = table.pop("__metadata__", {})
    data = memoryview(raw)[HEADER_LENGTH_BYTES + length :]
    return Header(
        metadata,
        {
            name: f"{entry['dtype']} {entry['shape']} "
            + hashlib.sha256(data[slice(*entry["data_offsets"])]).hexdigest()
            for name, entry in table.items()
        },
    )


def run_commands(checkout: Path, output: Path, base: Path, images: Path, only: str) -> list[str]:
    """Run the commands in folder `output`, with the source tree of `checkout`; return the failures."""
    (output / "shards").mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "NO_COLOR": "1", "PYTHONUTF8": "1"}
    failures: list[str] = []
    for name, text in (SPLIT | TRAIN | FILES).items():
        if only not in name:
            continue
        recipe = output / "recipe.toml"
        run_name = text.partition("run.name=")[2].partition(" ")[0]
        recipe.write_text(
            RECIPE.format(base=base.as_posix(), images=images.as_posix(), output=f"{run_name or 'run'}"),
            encoding="utf-8",
        )
        words = [word.format(base=base, recipe=recipe) for word in text.split()]
        command = [sys.executable, "-m", "spectune", *words]
        done = subprocess.run(
            command, cwd=output, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            failures.append(f"{checkout.name}: {name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return failures


def differing_keys(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def differences(before: Path, after: Path) -> tuple[list[str], list[str], int]:
    """Compare the safetensors files of two folders: (differences, differing metadata, number of tensors)."""
    names = [{path.relative_to(root) for path in root.rglob("*.safetensors")} for root in (before, after)]
    wrong = [f"{name}: only in one checkout" for name in sorted(map(str, names[0] ^ names[1]))]
    metadata: list[str] = []
    count = 0
    for name in sorted(names[0] & names[1]):
        old, new = read_file(before / name), read_file(after / name)
        count += len(old.tensors)
        wrong += [f"{name}: {key}" for key in differing_keys(old.tensors, new.tensors)]
        metadata += [
            f"{name}: {key}: {old.metadata.get(key)} -> {new.metadata.get(key)}"
            for key in differing_keys(old.metadata, new.metadata)
        ]
    return wrong, metadata, count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--work", type=Path, help="keep the files of both in this folder, and reuse those of BEFORE"
    )
    parser.add_argument("--only", default="", help="run only commands whose name contains this word")
    options = parser.parse_args()
    before, after = options.before.resolve(), options.after.resolve()
    base, images = after / "demo" / "base.safetensors", after / "demo" / "images"
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work.resolve() if options.work else Path(temporary)
        failures: list[str] = []
        if not (work / "before").is_dir():
            failures += run_commands(before, work / "before", base, images, options.only)
        failures += run_commands(after, work / "after", base, images, options.only)
        wrong, metadata, count = differences(work / "before", work / "after")
    for line in (*failures, *wrong, *metadata):
        print(line)
    print(f"{count} tensors compared, {len(wrong)} differ, {len(metadata)} metadata entries differ")
    return int(bool(failures or wrong or not count))


if __name__ == "__main__":
    sys.exit(main())
