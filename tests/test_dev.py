"""Pure functions of dev.py, and its messages for wrong commands."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import dev
from spectune.model import device

PYPROJECT = '[project]\nname = "x"\ndependencies = ["torch>=2.4"]\n[tool.ruff]\nline-length = 110\n'


def run_dev(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, dev.ROOT / "dev.py", *args], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 8, 10), (3, 10, 14)])
def test_an_old_python_is_reported_with_the_required_version(version: tuple[int, int, int]) -> None:
    complaint = dev.python_complaint(version, "python-of-mine")
    found = ".".join(str(part) for part in version)
    assert f"needs Python 3.11 or newer, python-of-mine is Python {found}\n" in complaint
    assert "hint: " in complaint


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 14, 2), (4, 0, 0)])
def test_a_new_python_is_accepted(version: tuple[int, int, int]) -> None:
    assert dev.python_complaint(version, "python") == ""


def test_dev_parses_on_pythons_that_are_too_old() -> None:
    """An old Python must report its version instead of a syntax error."""
    ast.parse((dev.ROOT / "dev.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_dev_needs_only_the_standard_library() -> None:
    tree = ast.parse((dev.ROOT / "dev.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def test_venv_python_on_windows_and_other_systems() -> None:
    assert dev.venv_python(Path("v"), windows=False) == Path("v/bin/python")
    assert dev.venv_python(Path("v"), windows=True) == Path("v/Scripts/python.exe")


def test_comments_and_blank_lines_of_a_lock_are_skipped() -> None:
    assert dev.without_comments("# head\n\na==1  # why\n-r other.lock\n") == ["a==1", "-r other.lock"]


def test_the_fingerprint_depends_only_on_installed_packages() -> None:
    first = dev.fingerprint(["a==1"], PYPROJECT, "(3, 11)")
    assert dev.fingerprint(["a==1"], PYPROJECT.replace("110", "100"), "(3, 11)") == first
    assert dev.fingerprint(["a==2"], PYPROJECT, "(3, 11)") != first
    assert dev.fingerprint(["a==1"], PYPROJECT.replace(">=2.4", ">=2.5"), "(3, 11)") != first
    assert dev.fingerprint(["a==1"], PYPROJECT, "(3, 12)") != first


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the commands that `dev.ensure` runs, in a simulated virtual environment."""
    commands: list[list[str]] = []

    def run(*command: object) -> int:
        commands.append([str(word) for word in command])
        return 0

    monkeypatch.setattr(dev.sys, "dont_write_bytecode", False)
    monkeypatch.setattr(dev, "VENV", tmp_path)
    monkeypatch.setattr(dev, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(dev, "run", run)
    monkeypatch.setattr(dev, "make_venv", lambda: Path("python"))
    monkeypatch.setattr(dev, "query", lambda _python, code: "2.12.0+cu130" if "torch" in code else "(3, 11)")
    return commands


def test_an_up_to_date_installation_is_not_repeated(installed: list[list[str]]) -> None:
    dev.ensure(dev.DEV_LOCK)
    assert len(installed) == 3
    dev.ensure(dev.DEV_LOCK)
    dev.ensure(dev.RUN_LOCK)
    assert len(installed) == 3


def test_modules_are_compiled_once(installed: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev.sys, "dont_write_bytecode", True)
    dev.ensure(dev.DEV_LOCK)
    assert all("--no-compile" in command for command in installed[:3])
    assert [command[1:3] for command in installed[3:]] == [["-m", "compileall"]]


def test_the_demo_installs_no_development_tools(installed: list[list[str]]) -> None:
    dev.ensure(dev.RUN_LOCK)
    pinned = (dev.VENV / "spectune-requirements.txt").read_text(encoding="utf-8")
    assert "torch==2.12.0+cu130\n" in pinned
    assert "pytest==" not in pinned
    dev.ensure(dev.DEV_LOCK)
    assert len(installed) == 6
    assert "pytest==" in (dev.VENV / "spectune-requirements.txt").read_text(encoding="utf-8")


def test_the_studio_installs_what_the_demo_installs(
    installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev, "find_build", lambda: None)
    dev.demo([])
    assert installed[-1] == ["python", "-m", "spectune", "demo"]
    del installed[:]
    assert dev.studio(["--port", "7000"]) == 0
    assert installed == [["python", "-m", "spectune", "studio", "--port", "7000"]]
    names = {line.partition("==")[0] for line in dev.read_lock(dev.RUN_LOCK)}
    assert {"fastapi", "uvicorn", "starlette", "python-multipart", "jinja2"} <= names


@pytest.mark.skipif(sys.platform == "win32", reason="a script for other systems")
@pytest.mark.parametrize(("version", "code"), [("3.10", 1), ("3.12", 0)])
def test_the_start_script_finds_a_new_python(tmp_path: Path, version: str, code: int) -> None:
    """The stand-in for Python runs dev.py only if its version is new enough."""
    shown = f"sys.version_info = ({version.replace('.', ', ')}, 0)"
    stand_in = tmp_path / "python3.12"
    stand_in.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c "import sys; {shown}; $2"\necho "$@"\n',
        encoding="utf-8",
    )
    stand_in.chmod(0o755)
    for program in ("dirname", "sh"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    done = subprocess.run(
        ["sh", dev.ROOT / "start-studio.sh", "--port", "7000"],
        env={"PATH": str(tmp_path)}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    expected = "dev.py studio --port 7000\n" if code == 0 else "spectune needs Python 3.11 or newer"
    assert done.stdout.startswith(expected)


def test_the_batch_file_has_the_line_ends_of_windows() -> None:
    text = (dev.ROOT / "start-studio.bat").read_bytes()
    assert text.count(b"\r\n") == text.count(b"\n") > 10
    assert b"%PYTHON% dev.py studio %*" in text


def test_a_failed_installation_is_repeated(
    installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(dev, "run", lambda *_command: 1)
        with pytest.raises(dev.DevError, match=r"pip failed.*\nhint: if it names a hash"):
            dev.ensure(dev.RUN_LOCK)
    dev.ensure(dev.RUN_LOCK)
    assert len(installed) == 3


def test_arguments_of_setup_are_passed_to_pip(installed: list[list[str]]) -> None:
    dev.ensure(dev.DEV_LOCK)
    dev.ensure(dev.DEV_LOCK, ["--upgrade"])
    assert [command[-3:-1] for command in installed if "--upgrade" in command] == [
        ["--no-deps", "-r"],
        ["--upgrade", "-r"],
        ["--no-deps", "-e"],
    ]


def test_all_packages_but_torch_are_installed_by_hash(
    installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    install = dev.install

    def read(python: Path, pip_args: list[str] | None, lines: list[str], *options: str) -> None:
        install(python, pip_args, lines, *options)
        written.append((dev.VENV / "spectune-requirements.txt").read_text(encoding="utf-8"))

    monkeypatch.setattr(dev, "install", read)
    dev.ensure(dev.DEV_LOCK)
    assert "--require-hashes" in installed[0]
    lines = written[0].splitlines()
    assert len(lines) == len(dev.read_lock(dev.DEV_LOCK)) - 1
    assert [line for line in lines if not re.search(r" --hash=sha256:[0-9a-f]{64}$", line)] == []
    assert not any(line.startswith("torch==") for line in lines)


def test_the_hashes_belong_to_the_pins_of_the_locks() -> None:
    rows = [row.split() for row in (dev.ROOT / dev.HASHES).read_text(encoding="utf-8").splitlines()]
    pins = {dev.pin_of(line) for line in dev.read_lock(dev.DEV_LOCK)}
    assert {row[0] for row in rows} == {pin for pin in pins if not pin.startswith("torch==")}, (
        "run lock_hashes.py"
    )
    assert all(len(row) > 1 and all(re.fullmatch("[0-9a-f]{64}", one) for one in row[1:]) for row in rows)


@pytest.mark.parametrize(
    ("rows", "build"),
    [
        ("580.95.05, 8.6\n", "cu130"),
        ("581.29, 7.5\n581.29, 12.0\n", "cu130"),
        ("550.54.14, 8.9\n", "cu126"),  # an old driver
        ("580.95.05, 6.1\n", "cu126"),  # CUDA 13 has no kernels for Pascal
        ("570.10, 12.0\n", "cu130"),  # CUDA 12.6 has no kernels for Blackwell
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_the_build_fits_driver_and_cards(rows: str, build: str | None) -> None:
    assert dev.cuda_build(rows) == build


def with_hardware(
    monkeypatch: pytest.MonkeyPatch, programs: set[str], *, rows: str = "", kfd: bool = False
) -> None:
    monkeypatch.setattr(dev.shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(dev, "output_of", lambda *command: rows)
    monkeypatch.setattr(dev.Path, "exists", lambda path: kfd)
    monkeypatch.setattr(dev.Path, "is_dir", lambda path: False)


@pytest.mark.parametrize(
    ("system", "programs", "kfd", "build"),
    [
        ("linux", {"nvidia-smi"}, False, "cu130"),
        ("win32", {"nvidia-smi"}, False, "cu130"),
        ("linux", {"rocminfo"}, True, "rocm7.2"),
        ("linux", {"rocm-smi"}, False, None),  # tools without a card
        ("win32", {"rocminfo"}, True, None),
        ("darwin", set(), False, None),
        ("linux", set(), True, None),
    ],
)
def test_the_build_is_chosen_by_looking_for_a_card(
    system: str, programs: set[str], kfd: bool, build: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev.sys, "platform", system)
    with_hardware(monkeypatch, programs, rows="580.95, 8.6\n", kfd=kfd)
    assert dev.find_build() == build


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], (None, [])),
        (["--torch", "cu126", "-q"], ("cu126", ["-q"])),
        (["-q", "--torch=rocm"], ("rocm7.2", ["-q"])),
        (["--torch", "auto"], (None, [])),
    ],
)
def test_the_build_is_named_by_an_option(
    args: list[str], expected: tuple[str | None, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev.sys, "platform", "linux")
    assert dev.split_torch_option(args) == expected


@pytest.mark.parametrize(
    ("system", "word", "message"),
    [
        ("win32", "cu128", "there is no build `cu128` of torch\nhint: choose from auto, rocm, cu126, cu130"),
        ("win32", "", "there is no build `` of torch"),
        ("darwin", "cpu", "macOS has only one build of torch"),
    ],
)
def test_an_unknown_build_is_refused(
    system: str, word: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev.sys, "platform", system)
    with pytest.raises(dev.DevError, match=message):
        dev.split_torch_option(["--torch", word])


def with_torch_installed(monkeypatch: pytest.MonkeyPatch, version: str, *, card: bool = True) -> list[str]:
    """Simulate an installed torch and a card; return the lines that dev.py prints."""
    said: list[str] = []
    monkeypatch.setattr(dev, "query", lambda _python, code: version if "torch" in code else "(3, 11)")
    monkeypatch.setattr(dev, "find_build", lambda: "cu130" if card else None)
    monkeypatch.setattr(dev, "say", said.append)
    monkeypatch.setattr(dev.sys, "platform", "linux")
    return said


def index_urls(commands: list[list[str]]) -> list[tuple[str, str]]:
    """Return the package and the index of each command that installs from another index."""
    return [(command[-3], command[-1]) for command in commands if "index-url" in " ".join(command)]


def test_the_build_for_the_card_is_installed_first(
    installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = with_torch_installed(monkeypatch, "")
    dev.ensure(dev.RUN_LOCK)
    assert index_urls(installed) == [("torch==2.13.0+cu130", "https://download.pytorch.org/whl/cu130")]
    assert index_urls(installed[1:2]) != []  # before pip would choose a build
    assert said[1] == "installing torch 2.13.0+cu130"


def test_without_a_card_pip_chooses_the_build(
    installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_torch_installed(monkeypatch, "", card=False)
    dev.ensure(dev.RUN_LOCK)
    assert [command[-2:] for command in installed[1:]] == [
        ["-r", str(dev.VENV / "spectune-requirements.txt")],
        ["-e", str(dev.ROOT)],
    ]
    assert "index-url" not in str(installed)


def test_a_cpu_build_beside_a_card_stays_with_a_warning(
    installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = with_torch_installed(monkeypatch, "2.13.0+cpu")
    monkeypatch.setattr(dev, "make_venv", lambda: dev.ROOT / "python")
    assert dev.setup([]) == 0
    assert index_urls(installed) == []
    assert said[-3:-1] == [
        "warning: torch 2.13.0+cpu does not use this computer's graphics card",
        "hint: python dev.py setup --torch cu130",
    ]


def test_a_requested_build_replaces_another_one_after_saying_so(
    installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = with_torch_installed(monkeypatch, "2.13.0+cpu")
    monkeypatch.setattr(dev, "make_venv", lambda: dev.ROOT / "python")
    dev.setup([])
    del said[:], installed[:]
    assert dev.setup(["--torch", "cu126"]) == 0
    assert index_urls(installed) == [("torch==2.13.0+cu126", "https://download.pytorch.org/whl/cu126")]
    assert said[1] == "replacing torch 2.13.0+cpu by torch 2.13.0+cu126"
    del installed[:]
    assert dev.setup(["--torch", "cpu"]) == 0  # it is there
    assert index_urls(installed) == []


def test_a_build_that_cannot_be_installed_is_an_error_with_a_hint(
    installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_torch_installed(monkeypatch, "")
    monkeypatch.setattr(dev, "run", lambda *command: int("--index-url" in command))
    with pytest.raises(dev.DevError, match=r"pip failed.*\nhint: install a torch of your choice"):
        dev.ensure(dev.RUN_LOCK)


def test_the_build_of_an_installed_torch_is_read_without_importing_it() -> None:
    assert dev.torch_version(Path(sys.executable)) == torch.__version__


def test_the_builds_are_those_that_error_messages_name() -> None:
    assert (
        {device.CUDA_BUILD, device.LEGACY_CUDA_BUILD} == {dev.NEWEST_CUDA, dev.OLDER_CUDA} <= set(dev.BUILDS)
    )
    assert dev.CUDA_13_DRIVER == device.CUDA_13_DRIVER


@pytest.mark.parametrize(
    ("installed", "stays"),
    [
        ("2.4.0", True),
        ("2.13.0+cpu", True),
        ("3.0.0.dev20270101+cu130", True),
        ("2.3.1", False),
        (None, False),
        ("", False),
    ],
)
def test_an_installed_torch_is_kept_if_it_is_new_enough(installed: str | None, stays: bool) -> None:
    lines = ["numpy==2.4.6", "torch==2.13.0", "torch-other==1"]
    kept = ["numpy==2.4.6", f"torch=={installed}", "torch-other==1"]
    assert dev.with_torch(lines, installed) == (kept if stays else lines)


def test_the_oldest_torch_and_python_match_the_package() -> None:
    project = tomllib.loads((dev.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = [line for line in project["dependencies"] if Requirement(line).name == "torch"]
    assert torch == "torch>=" + ".".join(map(str, dev.MIN_TORCH))
    assert project["requires-python"] == ">=" + ".".join(map(str, dev.MIN_PYTHON))


def test_the_dev_lock_includes_the_other_one() -> None:
    assert set(dev.read_lock(dev.RUN_LOCK)) < set(dev.read_lock(dev.DEV_LOCK))


@pytest.mark.parametrize("damage", [None, "", "{", "[]"])
def test_a_missing_or_damaged_stamp_counts_as_not_installed(
    damage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev, "STAMP", tmp_path / "stamp.json")
    if damage is not None:
        dev.STAMP.write_text(damage, encoding="utf-8")
    assert dev.read_stamps() == {}


def test_help_lists_every_command_on_stdout() -> None:
    done = run_dev("--help")
    assert done.returncode == 0
    assert [name for name in dev.COMMANDS if f"python dev.py {name}" not in done.stdout] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [(("tset",), "error: dev.py has no command `tset`"), ((), "error: dev.py needs a command")],
)
def test_a_wrong_command_is_refused(args: tuple[str, ...], message: str) -> None:
    done = run_dev(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)


def test_an_unknown_benchmark_is_refused_with_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev, "BENCHMARKS", tmp_path)
    for name in ("split", "train", "_shared"):
        (tmp_path / f"{name}.py").touch()
    with pytest.raises(dev.DevError, match=r"no benchmark `splt`\nhint: choose from split, train$"):
        dev.bench(["splt"])


def test_lint_fails_if_one_checker_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(*command: object) -> int:
        ran.append(str(command[2]))
        return -9 if command[3] == "format" else 0

    monkeypatch.setattr(dev, "ensure", lambda _lock: Path("python"))
    monkeypatch.setattr(dev, "run", run)
    assert dev.lint([]) == 1
    assert ran == ["ruff", "ruff", "pyright"]


@pytest.mark.parametrize(
    ("args", "commands"),
    [
        ([], [["-m", "mkdocs", "build", "--strict"]]),
        (["--serve"], [["-m", "mkdocs", "serve", "--strict"]]),
        (["--write"], [[str(dev.PAGE_GENERATOR)], ["-m", "mkdocs", "build", "--strict"]]),
    ],
)
def test_docs_builds_with_warnings_as_errors(
    args: list[str], commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(dev, "ensure", lambda _lock: Path("python"))
    monkeypatch.setattr(dev, "run", lambda *command: ran.append([str(word) for word in command[1:]]) or 0)
    assert dev.docs(args) == 0
    assert ran == commands
    assert dev.PAGE_GENERATOR.is_file()


def test_docs_stops_if_a_page_cannot_be_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev, "ensure", lambda _lock: Path("python"))
    monkeypatch.setattr(dev, "run", lambda *command: 1 if command[1] == dev.PAGE_GENERATOR else 0)
    assert dev.docs(["--write"]) == 1
    with pytest.raises(dev.DevError, match="docs has no option `--open`"):
        dev.docs(["--open"])
