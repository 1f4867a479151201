"""Output of `doctor`."""

from __future__ import annotations

from collections.abc import Iterator

from spectune.cli.console import print_note, print_warning, say, table
from spectune.errors import counted
from spectune.model.device import Card
from spectune.ops.doctor import DoctorReport
from spectune.ops.doctor.disk import Disk
from spectune.ops.doctor.machine import Machine
from spectune.ops.options.training import DoctorOptions


def show(result: DoctorReport, options: DoctorOptions, seconds: float) -> None:
    table("this machine", ("", "found"), list(_rows(result.machine)), left=2)
    packages = result.machine.packages
    if packages:
        rows = [(package.name, package.version or "missing", package.purpose) for package in packages]
        table("optional packages", ("package", "version", "for"), rows, left=3)
    for package in packages:
        if package.version is None:  # not in the table, which would break the command into lines
            say(f"to install {package.name}: {package.install}")
    for note in result.notes:
        print_note(note)
    for problem in result.problems:
        print_warning(problem)
    say(f"{counted(len(result.problems), 'problem')} found" if result.problems else "no problems found")


def _rows(machine: Machine) -> Iterator[tuple[str, str]]:
    versions, driver = machine.versions, machine.driver
    yield "system", versions.system
    yield "Python", f"{versions.python}, {versions.executable}"
    yield "spectune", versions.spectune
    yield "torch", f"{versions.torch}, built for {versions.torch_target}"
    if driver is not None:
        yield "NVIDIA driver", ", ".join([driver.version or "unknown", *driver.cards])
    for card in machine.cards:
        yield card.device, _card(card)
    if machine.mps:
        yield "mps", "the GPU of this Mac, which shares the main memory"
    if not machine.cards and not machine.mps:
        yield "GPU", "none that torch can use"
    yield "main memory", _free(machine.free_bytes, machine.total_bytes)
    yield "disk", _disk(machine.disk)
    for name, value in machine.variables.items():
        yield "variable", f"{name}={value}"
    file = machine.accelerate
    if file is None:
        yield "accelerate", "no configuration file, none is needed"
    else:
        found = (
            f"mixed_precision {file.mixed_precision}, num_processes {file.processes}, "
            f"distributed_type {file.kind}"
        )
        yield "accelerate", f"{file.path}: {file.failure or found}"


def _card(card: Card) -> str:
    bf16 = "bf16" if card.bf16 else "no bf16"
    return f"{card.name}, {card.architecture}, {bf16}, {_free(card.free_bytes, card.total_bytes)}"


def _free(free: int, total: int) -> str:
    return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _disk(disk: Disk) -> str:
    if disk.failure:
        speed = f"speed not measured: {disk.failure}"
    else:
        assert disk.write_speed is not None
        read = "" if disk.read_speed is None else f", reads {disk.read_speed / 1e6:.0f} MB/s"
        speed = f"writes {disk.write_speed / 1e6:.0f} MB/s{read}"
    return f"{disk.folder}: {_free(disk.free_bytes, disk.total_bytes)}, {speed}"
