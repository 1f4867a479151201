"""The devices of this machine: which one to use, how to name it, and what is wrong with it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from spectune.errors import InputError, printable

# Builds of torch for NVIDIA cards, as download.pytorch.org names them. CUDA 13 needs driver 580 and a card of
# compute capability 7.5; CUDA 12.6 also runs on older ones, but not on capability 10 and above.
CUDA_BUILD, LEGACY_CUDA_BUILD = "cu130", "cu126"
CUDA_13_DRIVER = 580
LARGE_UNET = 1_000_000_000  # parameters; SDXL's UNet has 2.6 billion
_QUERY_SECONDS = 20


def parse_device(word: str) -> str:
    """Return the torch device for auto, cpu, cuda, cuda:1 or mps. auto is the GPU if there is one.

    Raises InputError for a device that this machine does not have.
    """
    if word == "auto":
        return best_device()
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


def best_device() -> str:
    """Return the GPU if there is one, otherwise the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def drawing_dtype(device: str) -> torch.dtype:
    """Return the dtype to draw with: 16 bits on a GPU, float32 on the CPU."""
    if not device.startswith("cuda"):
        return torch.float16 if device == "mps" else torch.float32
    with torch.cuda.device(device):  # the next question is about the current device
        # older GPUs emulate bf16 slowly
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device. For CUDA it goes through pinned memory, and the host does not wait.

    A plain copy waits until the GPU has finished all earlier work. Kernels that start later on the same
    stream see the copy, and torch keeps the pinned memory until it is complete.
    """
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def tf32_products(device: torch.device) -> Iterator[None]:
    """Let an NVIDIA card round the factors of float32 products to TF32 (10 bits) inside the block."""
    before = torch.get_float32_matmul_precision()
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def describe_device(device: torch.device | str) -> str:
    """Return name, free and total memory of a device, and the version of torch."""
    device, build = torch.device(device), f"torch {torch.__version__}"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return f"{name} ({device}), {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {build}"
    memory = psutil.virtual_memory()
    return f"{device.type}, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free, {build}"


def build_warning() -> str | None:
    """Return a warning if this build of torch cannot use the NVIDIA card of this machine."""
    if torch.version.cuda is not None or torch.version.hip is not None or shutil.which("nvidia-smi") is None:
        return None
    return (
        f"torch {torch.__version__} cannot use the NVIDIA card of this machine; install a CUDA build of "
        f"torch: {install_line(CUDA_BUILD)}"
    )


def cpu_warnings(device: torch.device | str, unet_parameters: int) -> list[str]:
    """Return warnings if a GPU stays unused, or if a model is too large for a CPU."""
    if torch.device(device).type != "cpu":
        return []
    warnings = [warning for warning in [build_warning()] if warning is not None]
    if unet_parameters > LARGE_UNET:
        warnings.append("the model is of SDXL's size and no GPU is used: expect minutes per step")
    return warnings


def free_bytes(device: torch.device | str) -> int | None:
    """Return the bytes that this process can still allocate on a CUDA device; None for other devices.

    Memory that torch keeps for later tensors is free.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    # torch before 2.8 cannot return the fraction
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return min(free + reserved - allocated, round(fraction * total) - allocated)


def total_memory() -> int | None:
    """Return the bytes of the first CUDA card, None if there is none."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def memory_to_plan() -> int | None:
    """Return the bytes of the first CUDA card without those of the desktop, None if there is no card.

    A card of 12 GiB (12.9 GB) is planned as 12 GB. The other 7 % are left to the desktop and the browser.
    """
    total = total_memory()
    return None if total is None else total * 10**9 // 2**30


# ---------------------------------------------------------------- cards, builds and drivers


@dataclass(frozen=True)
class Card:
    """A GPU that torch finds."""

    device: str  # cuda:0
    name: str
    architecture: str  # sm_86, gfx1100
    bf16: bool  # in hardware
    has_kernels: bool  # this build of torch has kernels for its architecture
    free_bytes: int
    total_bytes: int


def find_cards() -> tuple[Card, ...]:
    """Return all GPUs that torch can use through CUDA or ROCm."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(_card(index) for index in range(count))


def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = (properties.major, properties.minor)
    rocm = torch.version.hip is not None
    with torch.cuda.device(index):  # the next question is about the current device
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Card(
        device=f"cuda:{index}",
        name=printable(properties.name),
        architecture=printable(properties.gcnArchName) if rocm else "sm_{}{}".format(*capability),
        bf16=bf16,
        has_kernels=rocm or _has_kernels(capability, torch.cuda.get_arch_list()),
        free_bytes=free,
        total_bytes=total,
    )


def _has_kernels(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Return whether a list like sm_75, sm_86, compute_90 serves a card.

    Machine code (sm) serves the same major version from its minor version on. PTX (compute) serves all newer
    cards.
    """
    for word in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", word)
        if match is None:
            continue
        target = (int(match[2]), int(match[3]))
        if target <= capability and (match[1] == "compute" or target[0] == capability[0]):
            return True
    return not built_for  # an empty list is no information


def build_target() -> str:
    """Return what this build of torch computes on: CUDA 13.0, ROCm 7.2, Metal, or CPU only."""
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    return "Metal" if torch.backends.mps.is_built() else "CPU only"


def install_line(build: str) -> str:
    """Return the command that installs a build of torch in the place of the present one."""
    return f"{pip_install()} --force-reinstall torch --index-url https://download.pytorch.org/whl/{build}"


def pip_install() -> str:
    """Return `PYTHON -m pip install` for the running Python, quoted for cmd, PowerShell and bash."""
    # PowerShell does not run a quoted path without an operator that cmd does not know.
    python = "python" if re.search(r"[\s'\"&()]", sys.executable) else sys.executable or "python"
    return f"{python} -m pip install"


@dataclass(frozen=True)
class NvidiaDriver:
    """What nvidia-smi reports."""

    version: str  # empty if nvidia-smi fails
    cards: tuple[str, ...] = ()
    failure: str = ""  # the first line of its message

    @property
    def major(self) -> int:
        """The number that CUDA's requirements name; 0 if it is unknown."""
        match = re.match(r"\d+", self.version)
        return int(match[0]) if match else 0


def find_nvidia_driver() -> NvidiaDriver | None:
    """Return the NVIDIA driver, or None if nvidia-smi is not installed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_QUERY_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return NvidiaDriver("", failure=printable(str(error)))
    rows = [line.partition(", ") for line in done.stdout.splitlines() if line.strip()]
    if done.returncode != 0 or not rows or not all(comma for _, comma, _ in rows):
        lines = (done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}").splitlines()
        return NvidiaDriver("", failure=printable(lines[0]))
    return NvidiaDriver(printable(rows[0][0]), tuple(printable(name) for _, _, name in rows))
