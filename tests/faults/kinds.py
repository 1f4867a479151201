"""The kinds of faults: each runs a command once, and something happens meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from tests.faults.children import Child, Ended, Setting, Strike, run
from tests.faults.jobs import Job
from tests.faults.place import Place


@dataclass(frozen=True)
class Scene:
    """A command that is about to meet a fault."""

    job: Job
    place: Place
    chance: Random
    usual: Ended  # the same command without a fault
    force: bool  # an older output is there and is replaced

    @property
    def arguments(self) -> list[str]:
        return self.job.arguments(self.place.inputs, self.place.out, force=self.force)

    def run(self, setting: Setting) -> Ended:
        return run(self.arguments, self.place.root, setting)

    def strike(self, action: Callable[[int], None], *, timed: bool = True) -> Strike:
        """Return a strike at a random file operation, or at a random moment."""
        if timed and self.chance.random() < 0.4:
            return Strike(action, after_seconds=self.chance.uniform(0, self.usual.seconds))
        # Half of the strikes hit the last operations, where files get their names.
        last = self.usual.operations
        first = max(1, last - 12) if self.chance.random() < 0.5 else 1
        return Strike(action, at_operation=self.chance.randint(first, max(first, last)))


def kill(scene: Scene) -> list[Ended]:
    """End the process without a warning, as a power failure does."""
    return [scene.run(Setting(scene.strike(lambda pid: os.kill(pid, signal.SIGKILL))))]


def ask_to_stop(scene: Scene) -> list[Ended]:
    """Send the signal of Ctrl-C, of a shutdown, or of a closed terminal."""
    number = scene.chance.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    return [scene.run(Setting(scene.strike(lambda pid: os.kill(pid, number))))]


def fill_the_disk(scene: Scene) -> list[Ended]:
    """Let the disk be small, or become full at a file operation, or refuse to let a file grow."""
    way = scene.chance.choice(("small", "fills", "quota") if scene.place.is_disk else ("quota",))
    if way == "fills":
        return [scene.run(Setting(scene.strike(lambda pid: scene.place.fill(), timed=False)))]
    # Evenly distributed on a logarithmic scale: outputs are pages of text or models.
    largest = int(2 ** scene.chance.uniform(8, 23))
    if way == "quota":
        return [scene.run(Setting(largest_file=largest))]
    used = sum(path.stat().st_size for path in scene.place.out.rglob("*") if path.is_file())
    scene.place.remount(f"size={used + largest + 65536}")
    return [scene.run(Setting())]


def freeze_the_disk(scene: Scene) -> list[Ended]:
    """Make the target read-only, before the command or at one of its file operations."""
    if scene.chance.random() < 0.5:
        scene.place.freeze()
        return [scene.run(Setting())]
    if not scene.place.is_disk:
        return [scene.run(Setting(scene.strike(lambda pid: scene.place.freeze(), timed=False)))]

    def freeze(pid: int) -> None:
        # A file system with a file that is open for writing cannot be remounted: it fails as a whole.
        try:
            scene.place.freeze()
        except Exception:
            scene.place.fill()

    return [scene.run(Setting(scene.strike(freeze, timed=False)))]


def change_an_input(scene: Scene) -> list[Ended]:
    """Overwrite, cut, replace or delete a model that the command reads."""
    path = scene.place.inputs / scene.chance.choice(scene.job.inputs)
    size, position = path.stat().st_size, scene.chance.random()

    def overwrite(pid: int) -> None:
        with path.open("rb+") as file:
            file.seek(size // 8 + int(position * size * 7 / 8))
            file.write(b"\x3c" * 65536)

    def cut(pid: int) -> None:
        os.truncate(path, int(position * size))

    def replace(pid: int) -> None:
        other = path.with_name("new")
        shutil.copyfile(scene.place.inputs / "other.safetensors", other)
        other.replace(path)

    def delete(pid: int) -> None:
        path.unlink()

    action = scene.chance.choice((overwrite, overwrite, cut, replace, delete))
    return [scene.run(Setting(scene.strike(action)))]


def run_twice_at_once(scene: Scene) -> list[Ended]:
    """Start the same command a second time while the first one runs."""
    first = Child(scene.arguments, scene.place.root, Setting())
    time.sleep(scene.chance.choice((0.0, scene.chance.uniform(0, scene.usual.seconds))))
    second = Child(scene.arguments, scene.place.root, Setting())
    return [first.wait(), second.wait()]


def turn_back_the_clock(scene: Scene) -> list[Ended]:
    """Let the time of day jump back and forth by up to ten years."""
    seed, real = scene.chance.random(), time.time

    def prepare() -> None:
        jumps = Random(seed)
        time.time = lambda: real() - jumps.choice((0.0, 1.0, 3600.0, 3e8)) * jumps.uniform(-0.1, 1.0)

    return [scene.run(Setting(prepare=prepare))]


KINDS: Mapping[str, Callable[[Scene], list[Ended]]] = {
    "kill": kill,
    "signal": ask_to_stop,
    "disk full": fill_the_disk,
    "read-only": freeze_the_disk,
    "changed input": change_an_input,
    "two at once": run_twice_at_once,
    "clock": turn_back_the_clock,
}
