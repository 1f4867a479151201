"""What must hold for the repository as a whole: sizes, paths, locks, and commands that its pages name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dev
from spectune.training.recipe.file import parse_recipe

ROOT = dev.ROOT
LARGEST_BYTES = 25_000_000

# Put together from parts, so that this file does not contain what it looks for.
MACHINE_FOLDERS = ("tmp", "root", "work", "farm", r"home/\w+", r"Users/\w+")
MACHINE_PATH = re.compile(r"(?<![\w.~/\-])(?:/|[A-Z]:[\\/])(?:" + "|".join(MACHINE_FOLDERS) + r")(?![\w\-])")

PLATFORMS = [
    {"sys_platform": sys_platform, "platform_system": system, "os_name": os_name, "platform_machine": machine}
    for sys_platform, system, os_name, machine in [
        ("linux", "Linux", "posix", "x86_64"),
        ("linux", "Linux", "posix", "aarch64"),
        ("darwin", "Darwin", "posix", "arm64"),
        ("win32", "Windows", "nt", "AMD64"),
    ]
]
ENVIRONMENTS = [
    {**platform, "python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    for platform in PLATFORMS
    for python in ("3.11", "3.12", "3.13", "3.14")
]


def repository_files() -> list[Path]:
    """Files that are tracked, or would be by `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for path in (ROOT / name for name in done.stdout.split("\0") if name) if path.is_file()]


def text_of(path: Path) -> str | None:
    """The text of a file, None when it is not one."""
    raw = path.read_bytes()
    return None if b"\0" in raw[:8192] else raw.decode("utf-8", errors="replace")


def test_no_file_is_larger_than_25_mb() -> None:
    large = {path.relative_to(ROOT): path.stat().st_size for path in repository_files()}
    assert {path: size for path, size in large.items() if size > LARGEST_BYTES} == {}


def test_no_text_names_a_path_of_one_machine() -> None:
    found: list[str] = []
    for path in repository_files():
        if path.suffix == ".lock":
            continue
        for number, line in enumerate((text_of(path) or "").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize("folder", ["tmp", "root", "work", "home/somebody", "Users/Somebody"])
def test_the_search_for_machine_paths_finds_them(folder: str) -> None:
    for text in (f"open('/{folder}/model.safetensors')", f"cd /{folder}", f"at C:/{folder}/x"):
        assert MACHINE_PATH.search(text), text
    for text in (
        f"see docs/{folder}/page.md",
        f"https://example.org/{folder}/",
        f"/{folder}-other/x",
        f"./{folder}",
    ):
        assert not MACHINE_PATH.search(text), text


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands_on(page: Path, program: str) -> Iterator[str]:
    """The words that follow a program's name in the code of a page: blocks and spans between backticks."""
    text = page.read_text(encoding="utf-8")
    for code in re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL):
        yield from re.findall(rf"(?<![\w/.\-]){program} +([a-z][a-z\-]*)", code)


def test_the_pages_name_commands_of_dev_py_that_exist() -> None:
    named = {(page.name, word) for page in pages() for word in commands_on(page, r"python3? dev\.py")}
    assert {word for page, word in named if page == "README.md"} >= {"demo", "test"}
    assert {(page, word) for page, word in named if word not in dev.COMMANDS} == set()


def test_the_pages_name_commands_of_spectune_that_exist() -> None:
    command = [sys.executable, "-m", "spectune", "--help"]
    plain = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    known = set(re.findall(r"^[ |│]{1,4}([a-z][a-z\-]*)\s", done.stdout, flags=re.MULTILINE))
    named = {(page.name, word) for page in pages() for word in commands_on(page, "spectune")}
    assert named, "no page shows a command"
    assert {(page, word) for page, word in named if word not in known} == set()


def test_links_between_pages_lead_somewhere() -> None:
    broken: list[str] = []
    for page in pages():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_the_recipes_on_the_pages_are_valid() -> None:
    """Parsing refuses unknown keys and values that do not fit."""
    for page in pages():
        for text in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            parse_recipe(tomllib.loads(text), label=page.name)


def pins() -> dict[str, Requirement]:
    """What the lock files pin, by canonical name."""
    requirements = map(Requirement, dev.read_lock(dev.DEV_LOCK))
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def wanted_in(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


def test_every_pin_is_one_exact_version_without_a_local_part() -> None:
    specifiers = {name: str(pin.specifier) for name, pin in pins().items()}
    assert {name: text for name, text in specifiers.items() if not re.fullmatch(r"==[^*+,]+", text)} == {}
    assert specifiers["torch"] == "==2.13.0"


def test_the_pins_lie_in_the_ranges_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(text)
        version = str(pins()[canonicalize_name(wanted.name)].specifier).removeprefix("==")
        assert wanted.specifier.contains(version), text


def test_the_locks_leave_out_nothing_on_any_platform() -> None:
    """Every package that a pinned one asks for is pinned, for the platforms and Pythons that are supported.

    Skips pins that are not installed here; torch itself pins what it needs for CUDA.
    """
    locked = pins()
    missing: set[str] = set()
    for name in locked:
        try:
            needs = map(Requirement, distribution(name).requires or [])
        except PackageNotFoundError:
            continue
        for need in needs:
            pin = locked.get(canonicalize_name(need.name))
            if name == "torch" and re.match(r"nvidia|cuda|triton", need.name):
                continue
            for environment in ENVIRONMENTS:
                if not (wanted_in(locked[name], environment) and wanted_in(need, environment)):
                    continue
                if pin is None or not wanted_in(pin, environment):
                    missing.add(f"{need.name}, wanted by {name} on {environment['sys_platform']}")
    assert missing == set()
