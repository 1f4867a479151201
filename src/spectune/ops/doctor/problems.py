"""What is wrong with a machine, each problem in one line with its remedy."""

from __future__ import annotations

from collections.abc import Iterator

from spectune.model.device import (
    CUDA_13_DRIVER,
    LEGACY_CUDA_BUILD,
    Card,
    NvidiaDriver,
    build_warning,
    install_line,
)
from spectune.ops.doctor.accelerate_file import SUPPORTED_KINDS, AccelerateFile
from spectune.ops.doctor.disk import Disk
from spectune.ops.doctor.machine import Machine

GB = 1e9
SMALLEST_CARD = 6 * GB  # the smallest that `plan` finds a way for at 1024 px
SMALLEST_MEMORY = 8 * GB  # an SDXL checkpoint of 16 bits is loaded into it
SMALLEST_DISK = 20 * GB  # a residual or rebuilt checkpoint is 7 GB, three states of a run 2 GB each
SLOWEST_DISK = 50e6  # bytes per second: a checkpoint of 7 GB takes more than two minutes


def find_problems(machine: Machine) -> tuple[str, ...]:
    """Return what is wrong, the most important first."""
    return (
        *machine.wrong_packages,
        *_unused_card(machine),
        *(line for card in machine.cards for line in _card_problems(card)),
        *_memory_problems(machine),
        *_disk_problems(machine.disk),
        *_accelerate_problems(machine.accelerate),
        *([machine.model_folders] if machine.model_folders else []),
    )


def find_notes(machine: Machine) -> tuple[str, ...]:
    """Return what is not wrong, but good to know."""
    return (*_allocator_note(machine), *_ignored_notes(machine))


def _unused_card(machine: Machine) -> Iterator[str]:
    """Yield why torch uses no GPU."""
    if machine.driver is not None and machine.driver.failure:
        yield f"nvidia-smi fails ({machine.driver.failure}): install the NVIDIA driver again"
    if machine.cards or machine.mps:
        return
    warning = build_warning()
    if warning is not None:
        yield warning
    elif machine.driver is not None and machine.driver.cards:
        yield _hidden_card(machine, machine.driver)
    elif machine.driver is None:
        yield (
            "there is no GPU that torch can use: a training step of SDXL takes minutes on a CPU; commands on "
            "files and `spectune demo` work"
        )


def _hidden_card(machine: Machine, driver: NvidiaDriver) -> str:
    """Return why a CUDA build of torch finds no card although the driver does."""
    torch = f"torch {machine.versions.torch} for {machine.versions.torch_target} finds no card"
    visible = machine.variables.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"{torch}: CUDA_VISIBLE_DEVICES={visible!r} hides it; unset this variable"
    if machine.versions.torch_target.startswith("CUDA 13") and 0 < driver.major < CUDA_13_DRIVER:
        return (
            f"{torch}: driver {driver.version} is older than {CUDA_13_DRIVER}; install a newer driver from "
            f"nvidia.com, or the older build: {install_line(LEGACY_CUDA_BUILD)}"
        )
    return f"{torch}, but nvidia-smi lists {driver.cards[0]}: restart the computer or install a newer driver"


def _card_problems(card: Card) -> Iterator[str]:
    if not card.has_kernels:
        yield (
            f"this build of torch has no kernels for {card.name} ({card.architecture}): "
            f"{install_line(LEGACY_CUDA_BUILD)}"
        )
    if not card.bf16:
        yield f"{card.name} has no bf16 in hardware, and emulates it slowly: use another run.precision"
    if card.total_bytes < SMALLEST_CARD:
        yield (
            f"{card.name} has {_gb(card.total_bytes)} GB: SDXL trains from {SMALLEST_CARD / GB:.0f} GB on; "
            "`spectune plan MODEL` shows what fits"
        )
    elif card.free_bytes < SMALLEST_CARD:
        yield (
            f"only {_gb(card.free_bytes)} of {_gb(card.total_bytes)} GB of {card.name} are free: "
            "close programs that use it, such as browsers, games and ComfyUI"
        )


def _gb(nbytes: int) -> str:
    return f"{nbytes / GB:.1f}"


def _memory_problems(machine: Machine) -> Iterator[str]:
    if machine.free_bytes < SMALLEST_MEMORY:
        yield (
            f"only {_gb(machine.free_bytes)} of {_gb(machine.total_bytes)} GB of main memory are free: "
            "an SDXL checkpoint takes 7 GB while it is loaded; close other programs"
        )


def _disk_problems(disk: Disk) -> Iterator[str]:
    if disk.failure:
        yield f"cannot write to {disk.folder} ({disk.failure}): work in another folder"
    if disk.free_bytes < SMALLEST_DISK:
        yield (
            f"only {_gb(disk.free_bytes)} GB are free on the disk of {disk.folder}: a checkpoint takes 7 GB, "
            "and so do the states of a run; use another disk or delete files"
        )
    for speed, verb in ((disk.write_speed, "written"), (disk.read_speed, "read")):
        if speed is not None and speed < SLOWEST_DISK:
            yield (
                f"the disk of {disk.folder} is slow: {speed / 1e6:.0f} MB are {verb} per second, so a "
                f"checkpoint of 7 GB takes {7e9 / speed / 60:.0f} minutes; use an SSD in this computer"
            )


def _accelerate_problems(file: AccelerateFile | None) -> Iterator[str]:
    if file is None:
        return
    if file.failure:
        yield f"cannot read {file.path} ({file.failure}): delete it, or run `accelerate config` again"
    if file.kind not in SUPPORTED_KINDS:
        yield (
            f"{file.path} requests {file.kind}, which spectune does not support: start with "
            "`spectune train`, which does not read this file"
        )
    if file.compiles:
        yield (
            f"{file.path} has a dynamo backend, which `accelerate launch` applies to the whole network: set "
            "run.compile in the recipe instead, and start with `spectune train`"
        )


def _allocator_note(machine: Machine) -> Iterator[str]:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    values = [machine.variables[name] for name in names if name in machine.variables]
    # Windows has no expandable segments.
    if (
        machine.cards
        and machine.versions.system.startswith("Linux")
        and not any("expandable_segments" in value for value in values)
    ):
        yield "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True wastes less of the card's memory in gaps"


def _ignored_notes(machine: Machine) -> Iterator[str]:
    precision = machine.variables.get("ACCELERATE_MIXED_PRECISION")
    if precision is not None:
        yield f"ACCELERATE_MIXED_PRECISION={precision} is ignored: run.precision in the recipe counts"
    file = machine.accelerate
    if file is not None and file.ignored:
        yield f"spectune ignores in {file.path}: {', '.join(file.ignored)}"
