"""The facts about this machine that the doctor reports."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from spectune.errors import InputError, printable, some_of
from spectune.files.model_folders.config import config_path, read_model_folders
from spectune.files.provenance import spectune_version
from spectune.model.device import Card, NvidiaDriver, build_target, find_cards, find_nvidia_driver
from spectune.ops.doctor.accelerate_file import AccelerateFile, find_accelerate_file
from spectune.ops.doctor.disk import Disk, measure_disk
from spectune.ops.doctor.packages import OptionalPackage, optional_packages, wrong_packages

# Environment variables that change what torch or accelerate do.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_DYNAMO_BACKEND",
)


@dataclass(frozen=True)
class Versions:
    """Programs and their versions."""

    system: str
    python: str
    executable: str
    spectune: str
    torch: str
    torch_target: str  # CUDA 13.0, ROCm 7.2, Metal, CPU only


@dataclass(frozen=True)
class Machine:
    """Everything that the doctor looks at."""

    versions: Versions
    driver: NvidiaDriver | None
    cards: tuple[Card, ...]
    mps: bool  # the GPU of a Mac
    free_bytes: int  # of the main memory
    total_bytes: int
    disk: Disk
    packages: tuple[OptionalPackage, ...]
    wrong_packages: tuple[str, ...]
    accelerate: AccelerateFile | None
    variables: dict[str, str]  # those of VARIABLES that are set
    model_folders: str = ""  # what is wrong with those of the user's configuration file


def find_machine(folder: Path) -> Machine:
    """Look at this machine, and measure the disk of `folder`."""
    memory = psutil.virtual_memory()
    return Machine(
        versions=Versions(
            system=f"{platform.system()} {platform.release()} ({platform.machine()})",
            python=platform.python_version(),
            executable=sys.executable,
            spectune=spectune_version(),
            torch=torch.__version__,
            torch_target=build_target(),
        ),
        driver=find_nvidia_driver(),
        cards=find_cards(),
        mps=torch.backends.mps.is_available(),
        free_bytes=memory.available,
        total_bytes=memory.total,
        disk=measure_disk(folder),
        packages=optional_packages(),
        wrong_packages=wrong_packages(),
        accelerate=find_accelerate_file(),
        variables={name: printable(os.environ[name]) for name in VARIABLES if name in os.environ},
        model_folders=wrong_model_folders(),
    )


def wrong_model_folders() -> str:
    """Return what is wrong with the configuration file; empty if nothing is."""
    try:
        missing = read_model_folders().missing
    except InputError as error:
        return f"{error.what}: {error.hint}"
    names = some_of([str(folder) for folder in missing])
    return (
        f"{config_path()} lists folders that do not exist: {names}; correct or remove them" if missing else ""
    )
