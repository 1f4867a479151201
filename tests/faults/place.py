"""The folders of a fault: inputs, outputs, and a disk that can be made full or read-only."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

LARGE_MIB = 512

Files = Mapping[str, str]  # SHA-256 by path relative to a folder


@dataclass(frozen=True)
class Place:
    """The folders of all faults."""

    root: Path
    is_disk: bool  # `disk` is a file system of its own, in memory

    @property
    def pristine(self) -> Path:
        """The inputs, which no command reads."""
        return self.root / "pristine"

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"

    @property
    def disk(self) -> Path:
        return self.root / "disk"

    @property
    def out(self) -> Path:
        return self.disk / "out"

    def renew(self) -> None:
        """Restore the inputs and empty the disk."""
        self.heal()
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        self.restore_inputs()

    def restore_inputs(self) -> None:
        """Copy the inputs again; the paths stay the same, because recipes and reports contain them."""
        shutil.rmtree(self.inputs, ignore_errors=True)
        shutil.copytree(self.pristine, self.inputs)

    def heal(self) -> None:
        """Make the disk large and writable."""
        (self.disk / "filler").unlink(missing_ok=True) if not self.is_disk else None
        if self.is_disk:
            self.remount("rw", f"size={LARGE_MIB}m")
            (self.disk / "filler").unlink(missing_ok=True)
        elif self.out.exists():
            self.out.chmod(0o755)

    def remount(self, *options: str) -> None:
        subprocess.run(["mount", "-o", ",".join(("remount", *options)), str(self.disk)], check=True)

    def fill(self) -> None:
        """Use the free space of the disk, but for some kilobytes."""
        with (self.disk / "filler").open("wb") as filler:
            free = shutil.disk_usage(self.disk).free
            os.posix_fallocate(filler.fileno(), 0, max(free - 8192, 1))

    def freeze(self) -> None:
        """Make the disk read-only."""
        if self.is_disk:
            self.remount("ro")
        else:
            self.out.chmod(0o555)


def make_place(root: Path, make_inputs: Callable[[Path], None]) -> Place:
    """Create the folders and the inputs; the disk is a file system of its own if the user may mount one."""
    (root / "disk").mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={LARGE_MIB}m", "tmpfs", str(root / "disk")]
    mounted = (
        shutil.which("mount") and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )
    place = Place(root, bool(mounted))
    make_inputs(place.pristine)
    place.renew()
    return place


def remove_place(place: Place) -> None:
    """Unmount the disk and delete all folders."""
    if place.is_disk:
        subprocess.run(["umount", str(place.disk)], check=True)
    shutil.rmtree(place.root)


def files_of(folder: Path) -> dict[str, str]:
    """Return the hashes of all files in a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def visible(files: Files) -> dict[str, str]:
    """Return the files whose path has no hidden part."""
    return {
        name: value for name, value in files.items() if not any(p.startswith(".") for p in name.split("/"))
    }
