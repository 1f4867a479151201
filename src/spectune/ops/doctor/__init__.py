"""Check this machine: Python, torch, cards, memory, packages, disk, and what of it is wrong."""

from __future__ import annotations

from dataclasses import dataclass

from spectune.errors import InputError
from spectune.operation import operation
from spectune.ops.doctor.machine import Machine, find_machine
from spectune.ops.doctor.problems import find_notes, find_problems
from spectune.ops.options.training import DoctorOptions


@dataclass(frozen=True)
class DoctorReport:
    """A machine, and what of it is wrong."""

    machine: Machine
    problems: tuple[str, ...]  # each with its remedy, the most important first
    notes: tuple[str, ...]


@operation(DoctorOptions)
def doctor(options: DoctorOptions) -> DoctorReport:
    """Check this machine for training: torch, cards, memory, packages, disk, accelerate's configuration.

    Raises InputError if `folder` is not a folder.
    """
    if not options.folder.is_dir():
        raise InputError(f"`folder` {options.folder} is not a folder", hint="pass an existing folder")
    machine = find_machine(options.folder)
    return DoctorReport(machine, find_problems(machine), find_notes(machine))
