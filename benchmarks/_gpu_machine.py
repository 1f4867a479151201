"""The stage of benchmarks/gpu.py that describes the machine. It imports nothing but torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks._gpu_rows import Emit, NeedsCuda
from benchmarks._gpu_settings import Settings

PACKAGES = ("diffusers", "transformers", "accelerate", "peft", "lycoris-lora", "bitsandbytes")


def describe(settings: Settings, emit: Emit, argument: str) -> None:
    """Record the card, the driver and the versions of everything that decides the speed."""
    packages = {name: _version(name) for name in PACKAGES}
    cuda = torch.cuda.is_available()
    card = torch.cuda.get_device_properties(0) if cuda else None
    emit(
        "none" if card is None else card.name,
        {
            "GB": 0.0 if card is None else card.total_memory / 1e9,
            "driver": _driver(),
            "torch": torch.__version__,
            "CUDA": torch.version.cuda or "none",
            "cuDNN": torch.backends.cudnn.version() if cuda else "none",
            "Python": platform.python_version(),
            "CPUs": os.cpu_count(),
            "tf32 of convolutions": torch.backends.cudnn.allow_tf32,
            "tf32 of products": torch.backends.cuda.matmul.allow_tf32,
            **packages,
        },
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """Return the version of the NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.split() or ["unknown"])[0]


def cuda_or_raise() -> torch.device:
    """Return the card; raise NeedsCuda without one."""
    if not torch.cuda.is_available():
        raise NeedsCuda
    return torch.device("cuda")
