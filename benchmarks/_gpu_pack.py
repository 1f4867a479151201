"""Download the wheels that benchmarks/gpu.py needs on a machine with Python and torch but without network."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_BYTES = 64 << 20
PEERS = ("peft", "lycoris-lora", "einops", "toml", "bitsandbytes")
# What every torch brings, and what no stage imports: TensorBoard and plots.
LEFT_OUT = [
    "torch",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
    "filelock",
    "setuptools",
    "hf-xet",
    "colorama",
    "tensorboard",
    "tensorboard-data-server",
    "absl-py",
    "grpcio",
    "markdown",
    "protobuf",
    "werkzeug",
    "matplotlib",
    "contourpy",
    "cycler",
    "fonttools",
    "kiwisolver",
    "pyparsing",
]
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)


def pinned() -> list[str]:
    """Return the requirements of the wheels, with the versions of the lock files."""
    run, dev = ((ROOT / name).read_text("utf-8") for name in ("requirements.lock", "requirements-dev.lock"))
    lines = re.findall(r"^([\w.-]+)==(\S+)", f"{run}\n{dev}", re.MULTILINE)
    own = {name for name, _ in re.findall(r"^([\w.-]+)==(\S+)", run, re.MULTILINE)} - set(LEFT_OUT)
    return [f"{name}=={version}" for name, version in lines if name in own or name in PEERS]


def pack(folder: Path, *, cuda: str, python: str) -> None:
    """Download the wheels for 64-bit Linux into a folder, and say how large they are."""
    folder.mkdir(parents=True, exist_ok=True)
    target = ["--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*pip, *target, *platforms, *pinned()], check=True)
    for wheel in folder.glob("bitsandbytes-*.whl"):
        keep_library(wheel, cuda)
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{folder}: {size / 1e6:.1f} MB")
    if size > LIMIT_BYTES:
        print(f"warning: more than {LIMIT_BYTES / 1e6:.1f} MB", file=sys.stderr)


def keep_library(wheel: Path, cuda: str) -> None:
    """Remove the libraries of bitsandbytes for other versions of CUDA, which are most of its wheel."""
    smaller = wheel.with_suffix(".tmp")
    kept = {"cpu", f"cuda{cuda}"}
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as part:
        for item in whole.infolist():
            library = re.search(r"libbitsandbytes_(\w+)\.so$", item.filename)
            if library is None or library[1] in kept:
                part.writestr(item, whole.read(item))
    smaller.replace(wheel)
