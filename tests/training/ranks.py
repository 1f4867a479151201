"""Start the processes of a training as command lines, without a launcher.

They are forked where the system can do that, because importing torch takes seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
import torch
from safetensors.torch import load_file

from spectune.training.recipe.commented import toml_item
from spectune.training.recipe.recipe import Recipe
from spectune.training.state import STATE

# Called in each process with its rank before it runs; what it returns is written to counts.json.
Prepare = Callable[[int], Any]


def write_recipe(recipe: Recipe, path: Path) -> Path:
    """Write the keys that a recipe sets as a TOML file."""
    document = tomlkit.document()
    for section, keys in recipe.model_dump(mode="json", exclude_unset=True).items():
        table = tomlkit.table()
        for key, value in keys.items():
            table.add(key, toml_item(value))
        document.add(section, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomlkit.dumps(document), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int  # the exit code, or minus the number of the signal that ended it
    said: str  # on stderr
    counts: Any = None  # what `Prepare` returned, after the run


class Ranks:
    """The running processes of a training; process i runs command line i."""

    def __init__(
        self,
        folder: Path,
        commands: Sequence[list[str]],
        *,
        hosts: int = 1,
        address: str = "127.0.0.1",
        prepare: Prepare | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        context: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
        count, here = len(commands), len(commands) // hosts
        common = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(here),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",  # also if there is a GPU: gloo transfers the gradients
        }
        self.processes = [
            context.Process(
                target=_run,
                args=(
                    command,
                    {**common, "RANK": str(rank), "LOCAL_RANK": str(rank % here)},
                    folder / str(rank),
                    prepare,
                ),
            )
            for rank, command in enumerate(commands)
        ]
        for process in self.processes:
            process.start()

    def said(self, rank: int) -> str:
        """Return what a process has printed on stderr so far."""
        path = self.folder / str(rank) / "stderr.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def wait_for_files(self, folder: Path, pattern: str, seconds: float = 240) -> None:
        """Wait until a folder has a file; the test fails if a process ends before that."""
        ends = time.monotonic() + seconds
        while not list(folder.glob(pattern)):
            for rank, process in enumerate(self.processes):
                assert process.is_alive(), self.said(rank)
            assert time.monotonic() < ends
            time.sleep(0.05)

    def wait(self, seconds: float = 240) -> list[Ended]:
        """Return how all processes ended; those that still run after some seconds are killed."""
        ends = time.monotonic() + seconds
        ended: list[Ended] = []
        for rank, process in enumerate(self.processes):
            process.join(max(0.0, ends - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
            counts = self.folder / str(rank) / "counts.json"
            loaded = json.loads(counts.read_text()) if counts.exists() else None
            ended.append(Ended(process.exitcode, self.said(rank), loaded))
        return ended


def launch(
    recipe: Path, log: Path, *options: str, within: Sequence[str] = (), **variables: str
) -> subprocess.Popen[bytes]:
    """Start torchrun with `options`, within the command `within`; stderr is written to a file."""
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "200",  # seconds to save
        **variables,
    }
    command = ["-m", "torch.distributed.run", *options, "-m", "spectune", "train", str(recipe)]
    with log.open("w") as stderr:
        return subprocess.Popen([*within, sys.executable, *command], env=environment, stderr=stderr)


def stop_when_saved(
    launchers: Sequence[subprocess.Popen[bytes]], folder: Path, log: Path, seconds: float = 240
) -> None:
    """Send SIGTERM to the last launcher when a state is saved, and wait for all; the run must save again."""
    ends = time.monotonic() + seconds
    try:
        while not list(folder.glob("*.state")):
            assert all(launcher.poll() is None for launcher in launchers), log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.1)
        launchers[-1].send_signal(signal.SIGTERM)
        for launcher in launchers:
            launcher.wait(seconds)
    finally:
        for launcher in launchers:
            launcher.kill()
    said = log.read_text()
    stopped = re.search(r"stopped at step (\d+)", said)
    assert stopped is not None, said
    assert (folder / f"t-step{int(stopped[1]):08d}.state" / STATE).is_file()
    assert "to continue from this step, run the same command again" in said


def errors(ended: Sequence[Ended]) -> list[str]:
    """Return the errors that all processes have printed."""
    return [line for one in ended for line in re.findall("^error: (.*)$", one.said, re.MULTILINE)]


def free_port() -> int:
    """Return a TCP port that no program uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(command: list[str], variables: dict[str, str], folder: Path, prepare: Prepare | None) -> None:
    folder.mkdir(exist_ok=True)
    # pytest replaces these streams
    sys.stdout = (folder / "stdout.txt").open("w", encoding="utf-8")
    sys.stderr = (folder / "stderr.txt").open("w", encoding="utf-8", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    os.environ.update(variables)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    from accelerate.state import AcceleratorState, GradientState

    from spectune.cli.app import main

    AcceleratorState._reset_state(True)  # of trainings in the process that was forked
    GradientState._reset_state()
    counts = prepare(int(variables["RANK"])) if prepare is not None else None
    try:
        main(command)
    finally:
        if counts is not None:
            (folder / "counts.json").write_text(json.dumps(counts))


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """Return the trained tensors of an adapter."""
    return {name: tensor for name, tensor in load_file(path).items() if "delta_" in name}


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest difference between the trained numbers of two adapters."""
    one, two = deltas(first), deltas(second)
    assert one.keys() == two.keys()
    assert max(float(tensor.abs().max()) for tensor in one.values()) > 1e-4  # something was trained
    return max(float((one[name] - two[name]).abs().max()) for name in one)
