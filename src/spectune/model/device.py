"""The devices of this machine: which one to use, how to name it, and what is wrong with it."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass

import psutil
import torch

from spectune.errors import InputError

_INSTALL = "https://pytorch.org/get-started/locally"


def parse_device(word: str) -> str:
    """Return the torch device for auto, cpu, cuda, cuda:1 or mps. auto is the GPU if there is one.

    Raises InputError for a device that this machine does not have.
    """
    if word == "auto":
        return best_device().name
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?|mps", word)
    if match is None:
        raise InputError(f"unknown device {word!r}", hint="pass auto, cpu, cuda, cuda:1 or mps")
    count = torch.cuda.device_count()
    if word.startswith("cuda") and int(match[1] or 0) >= count:
        hint = build_warning() or "pass cpu as `device`"
        raise InputError(f"no device {word}: torch finds {count} CUDA devices", hint=hint)
    if word == "mps" and not torch.backends.mps.is_available():
        raise InputError("no device mps on this machine", hint="pass cpu as `device`")
    return word


@dataclass(frozen=True)
class Device:
    """A device and its preferred dtype."""

    name: str
    dtype: torch.dtype


def best_device() -> Device:
    """Return the GPU with a 16-bit dtype if there is one, otherwise the CPU with float32."""
    if torch.cuda.is_available():
        # older GPUs emulate bf16 slowly
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device("cuda", torch.bfloat16 if native else torch.float16)
    if torch.backends.mps.is_available():
        return Device("mps", torch.float16)
    return Device("cpu", torch.float32)


def describe_device(device: torch.device | str) -> str:
    """Return name, free and total memory of a device, and the version of torch."""
    device, build = torch.device(device), f"torch {torch.__version__}"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return f"{name} ({device}), {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {build}"
    memory = psutil.virtual_memory()
    return f"{device}, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free, {build}"


def build_warning() -> str | None:
    """Return a warning if this build of torch cannot use the NVIDIA card of this machine."""
    if torch.version.cuda is not None or torch.version.hip is not None or shutil.which("nvidia-smi") is None:
        return None
    return (
        f"torch {torch.__version__} cannot use the NVIDIA card of this machine: install a CUDA build of "
        f"torch, see {_INSTALL}"
    )


def total_memory() -> int | None:
    """Return the bytes of the first CUDA card, None if there is none."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
