"""Check the complete repository: sizes, paths, locks, and the commands, links and recipes on its pages."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pathspec import PathSpec

import dev
from spectune.cli.app import app
from spectune.training.recipe.recipe import parse_recipe
from tests.test_layers import LEVELS

ROOT = dev.ROOT
DOCS = ROOT / "docs"
SRC = ROOT / "src" / "spectune"
LARGEST_BYTES = 25_000_000
MAX_LINE_LENGTH = 120

# The pattern is built from parts, so that this file does not match it.
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
    """Return the files that are tracked, or that `git add` would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for path in (ROOT / name for name in done.stdout.split("\0") if name) if path.is_file()]


def text_of(path: Path) -> str | None:
    """Return the text of a file, or None if the file is binary."""
    raw = path.read_bytes()
    return None if b"\0" in raw[:8192] else raw.decode("utf-8", errors="replace")


def test_no_file_is_larger_than_25_mb() -> None:
    large = {path.relative_to(ROOT): path.stat().st_size for path in repository_files()}
    assert {path: size for path, size in large.items() if size > LARGEST_BYTES} == {}


def test_no_text_contains_a_path_of_one_machine() -> None:
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
    """Return all pages: those of the documentation, and the Markdown files at the root and for GitHub."""
    return [
        *sorted(ROOT.glob("*.md")),
        *sorted((ROOT / ".github").rglob("*.md")),
        *sorted(DOCS.rglob("*.md")),
    ]


def commands_of_dev(page: Path) -> Iterator[str]:
    """Yield the first argument of every `python dev.py ...` in the code blocks and code spans of a page."""
    text = page.read_text(encoding="utf-8")
    for code in re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL):
        yield from re.findall(r"(?<![\w/.\-])python3? dev\.py +([a-z][a-z\-]*)", code)


def test_commands_of_dev_py_on_the_pages_exist() -> None:
    named = {(page.name, word) for page in pages() for word in commands_of_dev(page)}
    assert {word for page, word in named if page == "README.md"} >= {"demo", "test"}
    assert {(page, word) for page, word in named if word not in dev.COMMANDS} == set()


def spectune_commands(page: Path) -> list[list[str]]:
    """Return the arguments of every `spectune` command in the shell blocks of a page."""
    commands: list[list[str]] = []
    for code in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        lines = (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines())
        commands += [words[1:] for words in lines if words[:1] == ["spectune"]]
    return commands


def parse(arguments: list[str]) -> str:
    """Parse a command line without running it. Return the error, or "" if the command line is valid."""
    command: Any = typer.main.get_command(app)
    context, name = None, "spectune"
    try:
        while True:
            context = command.make_context(name, arguments, parent=context)
            if not hasattr(command, "commands"):
                return ""
            name, command, arguments = command.resolve_command(
                context, [*context._protected_args, *context.args]
            )
    except typer.Exit:  # --help
        return ""
    except Exception as error:  # typer's own copy of click raises classes that it does not export
        return str(error) or type(error).__name__


def test_the_commands_on_the_pages_are_valid() -> None:
    """Check names, options and the number of arguments; values are checked as far as the parser does."""
    commands = [(page.name, command) for page in pages() for command in spectune_commands(page)]
    assert len(commands) > 50, "the search finds too few commands"
    invalid = {(page, " ".join(command)): parse(command) for page, command in commands}
    assert {key: error for key, error in invalid.items() if error} == {}


def test_shell_commands_on_the_pages_have_no_single_quotes() -> None:
    """For cmd, these are no quotes. The text of docs/quick-start.md explains the exceptions."""
    blocks = {
        (page.name, code)
        for page in pages()
        for code in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    }
    commands = {(page, line.partition(" #")[0]) for page, code in blocks for line in code.splitlines()}
    assert {(page, line) for page, line in commands if "'" in line} == set()


@pytest.mark.parametrize(
    "line", ["reconstruct a.safetensors", "null a.safetensors -o b --ranks 3", "verify a b"]
)
def test_an_invalid_command_is_found(line: str) -> None:
    assert parse(line.split())


def test_spectune_commands_in_the_text_of_pages_exist() -> None:
    known = set(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
    spans = {
        (page.name, word)
        for page in pages()
        for word in re.findall(r"`spectune +([a-z][a-z\-]*)[^`]*`", page.read_text(encoding="utf-8"))
    }
    assert spans, "no page names a command in its text"
    assert {(page, word) for page, word in spans if word not in known} == set()


def test_links_between_pages_are_valid() -> None:
    broken: list[str] = []
    for page in pages():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_the_lines_of_the_pages_are_short() -> None:
    """Tables are exempt: a row of a table cannot be broken."""
    long = {
        f"{page.relative_to(ROOT)}:{number}": len(line)
        for page in pages()
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > MAX_LINE_LENGTH and not line.startswith("|")
    }
    assert long == {}


def test_the_recipes_on_the_pages_are_valid() -> None:
    """Parsing refuses unknown keys and values out of range."""
    for page in pages():
        for text in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            parse_recipe(tomllib.loads(text), label=page.name)


def test_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])([a-z_]+(?:/[a-z_]+)*(?:/|\.py))(?![\w/])", text))
    assert len(named) > 30
    assert {name for name in named if not any((root / name).exists() for root in (SRC, ROOT))} == set()


def test_the_architecture_lists_the_rooms_in_the_order_that_the_layer_test_enforces() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z]+)/` \|", text, flags=re.MULTILINE)
    assert listed == [room for room in sorted(LEVELS, key=LEVELS.__getitem__) if (SRC / room).is_dir()]


def test_versions_in_different_files_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0][
        "hooks"
    ]
    assert {name for hook in hooks for name in hook["additional_dependencies"]} == {str(pins()["ruff"])}


def test_the_package_of_the_comfy_registry_has_the_nodes_and_the_library_only() -> None:
    """comfy-cli packs the tracked files that .comfyignore does not match."""
    ignored = PathSpec.from_lines("gitwildmatch", (ROOT / ".comfyignore").read_text("utf-8").splitlines())
    names = [path.relative_to(ROOT).as_posix() for path in repository_files()]
    kept = [name for name in names if not ignored.match_file(name)]
    assert {"__init__.py", "comfyui_nodes/__init__.py", "pyproject.toml", "LICENSE"} <= set(kept)
    assert [name for name in names if name.startswith("src/") and name not in kept] == []
    assert {name.split("/")[0] for name in kept if "/" in name} == {"comfyui_nodes", "src"}
    assert "requirements.txt" not in names  # ComfyUI-Manager would install it into ComfyUI


def test_the_package_is_marked_as_typed() -> None:
    assert (SRC / "py.typed").is_file()


def pins() -> dict[str, Requirement]:
    """Return the pins of the lock files by canonical name."""
    requirements = map(Requirement, dev.read_lock(dev.DEV_LOCK))
    # the developers' lock comes last: if both locks pin a package, its marker counts
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


def test_every_pin_is_one_exact_version_without_a_local_part() -> None:
    specifiers = {name: str(pin.specifier) for name, pin in pins().items()}
    assert {name: text for name, text in specifiers.items() if not re.fullmatch(r"==[^*+,]+", text)} == {}
    assert specifiers["torch"] == "==2.13.0"


def test_pinned_versions_are_in_the_ranges_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    dev_extras = next(need.extras for need in map(Requirement, extras["dev"]) if need.name == "spectune")
    for text in chain(project["dependencies"], extras["dev"], *(extras[name] for name in dev_extras)):
        requirement = Requirement(text)
        if requirement.name == "spectune":
            continue
        version = str(pins()[canonicalize_name(requirement.name)].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), text


def test_the_locks_are_complete_on_every_platform() -> None:
    """Check that every dependency of a pinned package is pinned, for all supported platforms and Pythons.

    Pins that are not installed here are skipped. torch itself pins its dependencies for CUDA.
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
                if not (applies(locked[name], environment) and applies(need, environment)):
                    continue
                if pin is None or not applies(pin, environment):
                    missing.add(f"{need.name}, needed by {name} on {environment['sys_platform']}")
    assert missing == set()


def promised_tests(page: Path) -> list[str]:
    """Return every `tests/...py::test_name` on a page."""
    return re.findall(r"`(tests/[\w/]+\.py::\w+)`", page.read_text(encoding="utf-8"))


def test_the_tests_that_hold_the_promises_exist() -> None:
    named = promised_tests(DOCS / "reference" / "promises.md")
    assert len(named) > 30
    missing = []
    for name in named:
        file, _, function = name.partition("::")
        path = ROOT / file
        if not path.is_file() or f"def {function}(" not in path.read_text(encoding="utf-8"):
            missing.append(name)
    assert missing == []
