"""Two hosts train one model. They are network namespaces, connected by a cable that can be pulled."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spectune.training.loop import train
from spectune.training.recipe.recipe import Recipe
from spectune.training.state import load_state
from tests.training.ranks import (
    Ended,
    Ranks,
    errors,
    free_port,
    largest_difference,
    launch,
    stop_when_saved,
    write_recipe,
)

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "cable0"  # the name of the network interface of each host
_NETWORK = 0x40000000  # CLONE_NEWNET


def missing() -> str | None:
    """Return why this system cannot have network namespaces, or None."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need Linux, root and the program `ip`"
    name = f"spectune-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this system does not allow network namespaces"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


pytestmark = pytest.mark.slow


class Network:
    """Two namespaces, each with one end of a cable."""

    def __init__(self) -> None:
        self.names = [f"spectune-{os.getpid()}-{number}" for number in range(2)]

    def create(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
        one, two = self.names
        _ip("link", "add", CABLE, "netns", one, "type", "veth", "peer", "name", CABLE, "netns", two)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for link in ("lo", CABLE):
                _ip("-n", name, "link", "set", link, "up")

    def pull_the_cable(self) -> None:
        _ip("-n", self.names[1], "link", "set", CABLE, "down")

    def delete(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def enter(self, rank: int) -> None:
        """Move this process to its host."""
        libc: Any = ctypes.CDLL(None, use_errno=True)
        with Path(f"/run/netns/{self.names[rank]}").open() as namespace:
            assert libc.setns(namespace.fileno(), _NETWORK) == 0, os.strerror(ctypes.get_errno())
        os.environ["GLOO_SOCKET_IFNAME"] = CABLE


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if reason := missing():
        pytest.skip(reason)
    network = Network()
    try:
        network.create()
        yield network
    finally:
        network.delete()


@pytest.fixture
def hosts(network: Network, tmp_path: Path) -> Any:
    """Return a function that starts a training on both hosts, with a recipe for each."""

    def start(first: Recipe, second: Recipe, name: str = "logs") -> Ranks:
        folder = tmp_path / name
        paths = [write_recipe(one, folder / f"{host}.toml") for host, one in enumerate((first, second))]
        commands = [["train", str(path)] for path in paths]
        return Ranks(folder, commands, hosts=2, address=ADDRESSES[0], prepare=partial(Network.enter, network))

    return start


def codes(ended: list[Ended]) -> list[int]:
    return [one.code for one in ended]


def test_two_hosts_equal_one_process_and_the_second_needs_no_state(
    recipe_for: Any,
    hosts: Any,
    tmp_path: Path,
) -> None:
    train(recipe_for("one", 2))
    for steps in (1, 2):  # the second run resumes
        run = {"steps": steps}
        ended = hosts(recipe_for("a/run", 1, run=run), recipe_for("b/run", 1, run=run), f"logs{steps}").wait()
        assert codes(ended) == [0, 0], [one.said for one in ended]
    assert "resuming after step 1" in ended[0].said
    assert (
        largest_difference(tmp_path / "one" / "t.safetensors", tmp_path / "a" / "run" / "t.safetensors")
        <= 1e-6
    )
    assert not (tmp_path / "b").exists()


def test_different_pictures_stop_both_hosts_with_one_message(
    recipe_for: Any,
    hosts: Any,
    picture_folder: Path,
    tmp_path: Path,
) -> None:
    other = shutil.copytree(picture_folder, tmp_path / "copy" / picture_folder.name)
    (other / "2_shape" / "3.txt").write_text("another caption")
    ranks = hosts(recipe_for("a/run", 1), recipe_for("b/run", 1, data={"folders": [other]}))
    ended = ranks.wait()  # far less than the default of run.timeout_minutes
    assert codes(ended) == [2, 2], [one.said for one in ended]
    (message,) = errors(ended)
    assert re.match("the images or captions of process 0 on .* and of process 1 on .* differ", message)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_a_pulled_cable_ends_both_hosts_and_the_last_save_continues(
    recipe_for: Any,
    hosts: Any,
    network: Network,
    tmp_path: Path,
) -> None:
    run = {"steps": 100_000, "save_every_steps": 5, "keep_last": 1, "timeout_minutes": 0.2}
    ranks = hosts(recipe_for("a/run", 1, run=run), recipe_for("b/run", 1, run=run))
    ranks.wait_for_files(tmp_path / "a" / "run", "*.state")
    network.pull_the_cable()
    try:
        ended = ranks.wait()
    finally:
        _ip("-n", network.names[1], "link", "set", CABLE, "up")
    assert codes(ended) == [2, 2], [one.said for one in ended]
    for rank, one in enumerate(ended):  # neither host can know what the other prints
        assert "Traceback" not in one.said
        (message,) = errors([one])
        expected = f"process {rank} on .* has lost the other processes: no answer for run.timeout"
        assert re.match(expected, message)
    (state,) = (tmp_path / "a" / "run").glob("*.state")
    done = load_state(state).header.step
    run |= {"steps": done + 1, "timeout_minutes": 10}
    ended = hosts(recipe_for("a/run", 1, run=run), recipe_for("b/run", 1, run=run), "again").wait()
    assert codes(ended) == [0, 0], [one.said for one in ended]
    assert f"resuming after step {done}" in ended[0].said


def test_sigterm_to_one_launcher_saves_and_ends_both_hosts(
    recipe_for: Any,
    network: Network,
    tmp_path: Path,
) -> None:
    run = {"steps": 100_000, "save_every_steps": 3}
    recipe = write_recipe(recipe_for("run", 1, run=run), tmp_path / "recipe.toml")
    log, port = tmp_path / "0.txt", free_port()
    launchers = [
        launch(
            recipe,
            tmp_path / f"{host}.txt",
            *f"--nnodes 2 --nproc_per_node 1 --node_rank {host}".split(),
            *f"--master_addr {ADDRESSES[0]} --master_port {port}".split(),
            within=["ip", "netns", "exec", name],
            GLOO_SOCKET_IFNAME=CABLE,
        )
        for host, name in enumerate(network.names)
    ]
    stop_when_saved(launchers, tmp_path / "run", log)
