"""spectune runs no code from files and opens no connection by itself."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import spectune

SRC = Path(__file__).resolve().parents[1] / "src" / "spectune"
# Modules that run code from their input, and modules that open connections.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "runpy", "imp", "code"}
NETWORK_MODULES = {"socket", "urllib.request", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
# `socket.gethostname` names the owner of a lock.
ALLOWED = {
    ("socket", "training/resume/lock.py"),
    # The names come from tables in the program, never from a file.
    ("import_module", "__init__.py"),
    ("import_module", "cli/command.py"),
    ("import_module", "training/optim/kinds.py"),
    ("import_module", "training/callbacks/screens.py"),
    ("import_module", "studio/app.py"),
    ("import_module", "studio/assistant/questions.py"),
    ("socket", "studio/serve.py"),  # the Studio listens on this computer
    ("http", "studio/serve.py"),  # and asks this computer whether it runs already
}


def modules() -> list[tuple[str, ast.Module]]:
    return [
        (path.relative_to(SRC).as_posix(), ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(SRC.rglob("*.py"))
    ]


def dangers(tree: ast.AST) -> set[str]:
    """Return what a module does that could run foreign code or open a connection."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            for bad in UNSAFE_MODULES | NETWORK_MODULES:
                if any(name == bad or name.startswith(f"{bad}.") for name in names):
                    found.add(bad)
        elif isinstance(node, ast.Call):
            found |= _dangers_of_call(node)
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.add("trust_remote_code")
    return found


def _dangers_of_call(call: ast.Call) -> set[str]:
    keywords = {word.arg: word.value for word in call.keywords}
    found = {"trust_remote_code"} & keywords.keys()
    function = call.func
    if isinstance(function, ast.Name) and function.id in UNSAFE_CALLS | {"import_module"}:
        found.add(function.id)
    if not isinstance(function, ast.Attribute):
        return found
    if function.attr in ("import_module", "exec_module", "spec_from_file_location"):
        found.add(function.attr)
    owner = ast.unparse(function.value)
    weights_only = keywords.get("weights_only")
    if (owner, function.attr) == ("torch", "load") and ast.unparse(weights_only or ast.Constant(0)) != "True":
        found.add("torch.load")
    if (owner, function.attr) in {("np", "load"), ("numpy", "load")} and "allow_pickle" in keywords:
        found.add("allow_pickle")
    if owner == "yaml" and function.attr in ("load", "unsafe_load", "full_load"):
        found.add("yaml.load")
    return found


def test_no_module_runs_code_from_files_or_opens_connections() -> None:
    found = {(danger, name) for name, tree in modules() for danger in dangers(tree)}
    assert found <= ALLOWED, found - ALLOWED
    assert len(modules()) > 200


@pytest.mark.parametrize(
    ("line", "danger"),
    [
        ("import pickle", "pickle"),
        ("from http.client import HTTPSConnection", "http"),
        ("from urllib import request", "urllib.request"),
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "torch.load"),
        ("eval(text)", "eval"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "trust_remote_code"),
        ("importlib.import_module(name)", "import_module"),
        ("yaml.load(text)", "yaml.load"),
    ],
)
def test_the_search_for_unsafe_code_finds_it(line: str, danger: str) -> None:
    assert dangers(ast.parse(line)) == {danger}


def test_safe_code_passes() -> None:
    assert (
        dangers(ast.parse("torch.load(path, weights_only=True)\nyaml.safe_load(text)\nre.compile('a')"))
        == set()
    )


def test_libraries_send_no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("DISABLE_TELEMETRY", "0")
    importlib.reload(spectune)
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert os.environ["DISABLE_TELEMETRY"] == "0"  # what the user has set stays


# Every way to a connection ends in one of these. Local sockets are allowed: multiprocessing uses them.
BLOCKED = """
import socket, sys

real = socket.socket

class Blocked(real):
    def __init__(self, family=-1, *args, **kwargs):
        if family != getattr(socket, "AF_UNIX", None):
            raise AssertionError(f"NETWORK: a socket of family {family}")
        super().__init__(family, *args, **kwargs)

def refuse(*args, **kwargs):
    raise AssertionError(f"NETWORK: a look-up of {args}")

socket.socket = socket.SocketType = Blocked
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse

from spectune.cli.app import main

main(sys.argv[1:])
"""


def run_blocked(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process in which every socket raises an error."""
    script = folder / "blocked.py"
    script.write_text(BLOCKED, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(SRC.parent), "HF_HOME": str(folder / "no-such-cache")}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def test_sockets_are_really_blocked(tmp_path: Path) -> None:
    script = (
        BLOCKED.partition("from spectune")[0]
        + "import urllib.request\nurllib.request.urlopen('http://[::1]')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "NETWORK" in done.stderr


@pytest.mark.slow
def test_the_demo_and_the_commands_work_without_a_network(tmp_path: Path) -> None:
    """The demo splits, verifies, trains, rebuilds, exports, and draws pictures."""
    demo = run_blocked("demo", "-o", "demo", "--steps", "3", folder=tmp_path)
    assert (demo.returncode, "NETWORK" in demo.stderr) == (0, False), demo.stderr[-2000:]
    base = Path(__file__).resolve().parents[1] / "demo"
    tuned = tmp_path / "demo" / "emoji3d.safetensors"
    for line in (
        f"new {base / 'base.safetensors'} {base / 'images'} -o r.toml --vram 12GB --yes",
        f"train {base / 'demo.toml'} --set run.steps=2 --set run.output={tmp_path / 'out'} "
        f"--set model.principal={tmp_path / 'demo' / 'base.principal-r16.safetensors'} "
        "--set run.tensorboard=true --set run.save_every_steps=1",
        f"merge {base / 'base.safetensors'}:0.5 demo/base-emoji3d.safetensors:0.5 -o m.safetensors",
        f"convert {base / 'base.safetensors'} -o folder",
        f"null {base / 'base.safetensors'} -o null.safetensors",
        f"inspect {tuned} --json",
        f"dataset {base / 'images'} --resolution 64 --sheet sheet.png",
        "doctor",
    ):
        done = run_blocked(*line.split(), folder=tmp_path)
        assert (done.returncode, "NETWORK" in done.stderr) == (0, False), (line, done.stderr[-2000:])


@pytest.mark.slow
def test_a_split_works_without_a_network(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = run_blocked("split", str(tiny_checkpoint), "--rank", "2", "-o", "out", folder=tmp_path)
    assert (done.returncode, "NETWORK" in done.stderr) == (0, False), done.stderr[-2000:]
    assert len(list((tmp_path / "out").iterdir())) == 2
